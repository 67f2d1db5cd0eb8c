"""Which fields of a request pass, beside those that an API declares.

- *Inert* fields cannot change the output: they pass with any value.
- *Known* fields of other engines that are not done pass with a value that asks for nothing; any
  other value is an error with the field's name.
- An unknown field is an error if its name is close to a field of thinking or sampling, or if the
  server is strict. Otherwise it is ignored, and the response names it.

null is never an error. Owns the tables of names; knows no schema.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.server.request_notes import MAX_NAME_CHARS, MAX_UNKNOWN_FIELDS, current_notes

CLOSE = 0.84  # least similarity of a misspelt name, by difflib's ratio
MEANINGS = ("think", "thought", "reasoning", "budget")  # parts of names that are never ignored

_WHO_ASKS = """user safety_identifier metadata client_metadata client_request_id request_id rid
    session_id conversation_id chat_id thread_id trace_id tags trace custom_labels extra_key"""
_CACHES = """prompt_cache_key prompt_cache_options prompt_cache_retention cache_control cache_prompt
    context_management store ngram_corpus_id keep_alive id_slot num_ctx"""
_ROUTES_AND_REPORTS = """service_tier include inference_geo models provider route transforms usage
    timings_per_token return_progress return_cached_tokens_details return_meta_info
    guided_decoding_backend data_parallel_rank routed_dp_rank moderation access_programs
    stream_interval api_type api_server"""
# Settings of samplers and filters whose own switch is in UNSUPPORTED.
_OF_SWITCHES = """mirostat_tau mirostat_eta dynatemp_low dynatemp_high dynatemp_exponent
    smoothing_curve dry_base dry_allowed_length dry_sequence_breakers dry_penalty_last_n
    xtc_threshold rep_pen_range rep_pen_slope repeat_last_n max_tokens_second truncation_length
    speculative_ngram legacy_api"""
INERT = frozenset(f"{_WHO_ASKS} {_CACHES} {_ROUTES_AND_REPORTS} {_OF_SWITCHES}".split())

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "conversation": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "bad_words": (),
    "chat_template": (),
    "documents": (),
    "early_stopping": (False,),
    "ec_transfer_params": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": (),
    "logprob_token_ids": (),
    "media_io_kwargs": (),
    "min_tokens": (0,),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_assistant_tokens_mask": (False,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    # SGLang
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "custom_logit_processor": (),
    "images_config": (),
    "input_ids": (),
    "lora_path": (),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "routed_experts_start_len": (0,),
    "separate_reasoning": (True,),
    "session_params": (),
    "stop_regex": (),
    "stream_reasoning": (True,),
    "task": (),
    "use_audio_in_video": (False,),
    # llama.cpp, text-generation-webui, KoboldCpp, Ollama, transformers
    "add_bos_token": (True,),
    "ban_eos_token": (False,),
    "banned_strings": (),
    "banned_tokens": (),
    "custom_token_bans": (),
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "dynamic_temperature": (False,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "format": (),
    "grammar_string": (),
    "guidance_scale": (1.0,),
    "lora": (),
    "min_keep": (0, 1),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "negative_prompt": (),
    "no_repeat_ngram_size": (0,),
    "nsigma": (0, -1),
    "num_beams": (1,),
    "options": (),
    "parse_tool_calls": (True,),
    "penalty_alpha": (0,),
    "post_sampling_probs": (False,),
    "presence_context_size": (0,),
    "reasoning_format": ("auto", "deepseek"),
    "rep_pen": (1.0,),
    "repeat_penalty": (1.0,),
    "repetition_penalty_range": (0, -1),
    "samplers": (),
    "sampler_order": (),
    "sampler_priority": (),
    "skew": (0,),
    "smoothing_factor": (0,),
    "t_max_predict_ms": (-1, 0),
    "temperature_last": (False, True),
    "tfs": (1.0,),
    "tfs_z": (1.0,),
    "thinking_forced_open": (False,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "typical": (1.0,),
    "typical_p": (1.0,),
    "xtc_probability": (0,),
}
"""Known fields that would change the output, each with the values that ask for nothing. So do empty
texts, lists and objects."""

_THINKING = """answer_reserve enable_thinking final_text max_thinking_tokens max_tokens_thinking
    min_thinking_tokens min_tokens_thinking num_waits reasoning reasoning_effort thinking
    thinking_budget thinking_checkpoints thinking_deadline_ms thinking_early_exit
    thinking_loop_repeats thinking_n_ignore thinking_n_ignore_str thinking_token_budget wait_text
    thinking_budget_tokens reasoning_budget_tokens reasoning_max_tokens custom_params nvext think"""
_SAMPLING = """cache_salt deadline_ms first_token_deadline_ms frequency_penalty ignore_eos
    logit_bias logprobs max_completion_tokens max_new_tokens max_output_tokens max_tokens min_p n
    n_predict num_predict presence_penalty priority random_seed repetition_penalty seed stop
    stop_sequences stop_token_ids stopping_strings temperature top_k top_logprobs top_p"""
_FORM = """add_generation_prompt chat_template_kwargs continue_final_message response_format
    structured_outputs guided_json guided_json_object guided_regex guided_choice guided_grammar
    json_schema regex ebnf grammar"""
THINKING, SAMPLING = frozenset(_THINKING.split()), frozenset(_SAMPLING.split())
MEANINGFUL = THINKING | SAMPLING | frozenset(_FORM.split()) | frozenset(UNSUPPORTED)
"""Fields that change the output: a name that is close to one of them is never ignored."""


@dataclass(frozen=True, slots=True)
class FieldRules:
    """The rules of one class of JSON objects."""

    inert: frozenset[str] = frozenset()
    unsupported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    lenient: bool = False
    """Any other field is inert: of messages, parts and tools, which clients extend freely."""
    place: str = ""
    """The object's own name and a point; empty: the body itself."""

    def kept(self, values: Mapping[str, Any], declared: frozenset[str]) -> dict[str, Any]:
        """Return the declared fields, without nulls. Raises RequestError."""
        kept = {}
        for name, value in values.items():
            if value is None or (name not in declared and (self.lenient or name in self.inert)):
                continue
            if name in declared:
                kept[name] = value
            elif name in self.unsupported:
                self._check_neutral(name, value)
            else:
                self._note_unknown(name, declared)
        return kept

    def _check_neutral(self, name: str, value: Any) -> None:
        allowed = self.unsupported[name]
        if value in ("", [], {}) or any(same(value, neutral) for neutral in allowed):
            return
        only = (
            f" with another value than {' or '.join(map(json.dumps, allowed))}" if allowed else ""
        )
        raise self._error(f"{self.place}{name} is not supported{only}", name)

    def _note_unknown(self, name: str, declared: frozenset[str]) -> None:
        notes, full = current_notes(), self.place + name
        if len(notes.ignored) >= MAX_UNKNOWN_FIELDS:
            raise self._error(f"the body has more than {MAX_UNKNOWN_FIELDS} unknown fields", name)
        near = nearest(name, MEANINGFUL | declared if self.place else MEANINGFUL)
        if near == name:
            raise self._error(f"{shown(full)} is not a field of this object", name)
        if near is not None:
            where = f"{self.place}{near}" if near in declared else near
            raise self._error(f"unknown field {shown(full)}; did you mean {where}?", name)
        if notes.strict or any(part in name.lower() for part in MEANINGS):
            raise self._error(f"unknown field {shown(full)}", name)
        notes.ignored[full] = None

    def _error(self, message: str, name: str) -> RequestError:
        param = self.place.partition(".")[0] or name[:MAX_NAME_CHARS]
        return RequestError(message, param=param)


def same(value: object, neutral: object) -> bool:
    """True if equal, and both or none are booleans: 1 is 1.0, but not True."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


@lru_cache(1024)
def nearest(name: str, candidates: frozenset[str]) -> str | None:
    """Return the candidate that a name misspells: in another case, with other separators, with its
    words in another order, or with a few letters changed."""
    if len(name) > MAX_NAME_CHARS:
        return None
    best, found = CLOSE, None
    for form in _forms(name):
        matcher, letters = difflib.SequenceMatcher(b=form, autojunk=False), set(form)
        for other, (spelled, others) in _spellings(candidates).items():
            # Cheap bounds of the ratio: letters that only one form has, and their lengths.
            apart = max(len(letters ^ others), abs(len(form) - len(other)))
            if apart > (1 - best) * (len(form) + len(other)):
                continue
            matcher.set_seq1(other)
            if matcher.quick_ratio() > best and (ratio := matcher.ratio()) > best:
                best, found = ratio, spelled
    return found


@lru_cache(64)
def _spellings(candidates: frozenset[str]) -> dict[str, tuple[str, set[str]]]:
    """Return the names by their forms, and the letters of each form."""
    forms = {_forms(name)[0]: name for name in sorted(candidates)}
    forms = {_forms(name)[1]: name for name in sorted(candidates)} | forms
    return {form: (name, set(form)) for form, name in forms.items()}


def _forms(name: str) -> tuple[str, str]:
    """Return a name without case and separators, as it is and with sorted words."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return "".join(words), "".join(sorted(words))
