"""llama.cpp through llama-cpp-python, batched as its own server does: prompts in batches of at most
2,048 tokens, then one token of every sequence a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s1engine.bench.cpu_adapter import EngineSetup, Generate, Ids

PACKAGE = "llama_cpp_python"
BATCH = 2048  # tokens of one call, llama.cpp's default

# Hugging Face names after ``model.layers.N.``, and GGUF's
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """GGUF's name of a Qwen2 tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    layer, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[inner]}.{kind}"


def convert(source: Path, target: Path, precision: str) -> None:
    """Write GGUF in bf16, or Q8_0 or Q4_0 converted from it by llama.cpp."""
    import llama_cpp

    target.mkdir()
    plain = target / "bf16.gguf"
    _write_gguf(source, plain)
    if precision == "bf16":
        plain.rename(target / "model.gguf")
        return
    kinds = {
        "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kinds[precision]
    paths = (str(plain).encode(), str(target / "model.gguf").encode())
    if llama_cpp.llama_model_quantize(*paths, params):
        raise RuntimeError("llama_model_quantize failed")
    plain.unlink()


def _write_gguf(source: Path, path: Path) -> None:
    import json

    import gguf

    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_vocabulary(writer, source, config)
    for name, raw, shape in bf16_tensors(source / "model.safetensors"):
        if len(shape) == 1:  # norms and biases: float32, as llama.cpp's converter writes them
            wide = (raw.astype("uint32") << 16).view("float32")
            writer.add_tensor(gguf_name(name), wide)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), raw.reshape(shape).view("uint8"), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, source: Path, config: dict[str, Any]) -> None:
    import json

    import gguf

    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(config["eos_token_id"])


def bf16_tensors(path: Path) -> Any:
    """Name, bits [numel] as uint16 and shape of every tensor. numpy has no bf16, so the file is
    parsed here: the length of a JSON header, the header, then the tensors."""
    import json

    import numpy as np

    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(bytes(data[8:start])).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16"
            first, last = entry["data_offsets"]
            yield name, data[start + first : start + last].view(np.uint16), entry["shape"]


def load(target: Path, setup: EngineSetup) -> Generate:
    """A memory-mapped model and one context for all sequences."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    path = str(target / "model.gguf").encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError("llama_model_load_from_file failed")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = setup.max_seqs * setup.max_len
    params.n_batch = BATCH
    params.n_seq_max = setup.max_seqs
    params.n_threads = params.n_threads_batch = setup.threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama_init_from_model failed")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return _Context(context, vocabulary).generate


class _Context:
    """Greedy decoding of many sequences in one llama_context."""

    def __init__(self, context: Any, vocab_size: int) -> None:
        import llama_cpp
        import numpy as np

        self._llama: Any = llama_cpp
        self._context = context
        self._vocab_size = vocab_size
        self._batch = batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        view = np.ctypeslib.as_array
        self._token, self._pos = view(batch.token, (BATCH,)), view(batch.pos, (BATCH,))
        self._logits = view(batch.logits, (BATCH,))
        self._n_seq_id = view(batch.n_seq_id, (BATCH,))
        self._n_seq_id[:] = 1

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_clear(memory, True)
        outputs: list[Ids] = [[] for _ in prompts]
        rows = [
            (token, pos, seq, pos == len(prompt) - 1)
            for seq, prompt in enumerate(prompts)
            for pos, token in enumerate(prompt)
        ]
        for begin in range(0, len(rows), BATCH):
            self._decode(rows[begin : begin + BATCH], outputs)
        for step in range(new - 1):
            last = [
                (ids[-1], len(prompt) + step, seq, True)
                for seq, (prompt, ids) in enumerate(zip(prompts, outputs, strict=True))
            ]
            self._decode(last, outputs)
        return outputs

    def _decode(self, rows: list[tuple[int, int, int, bool]], outputs: list[Ids]) -> None:
        """Compute rows (token, position, sequence, is last); append the token after each last."""
        import numpy as np

        count = self._batch.n_tokens = len(rows)
        self._token[:count], self._pos[:count], _, self._logits[:count] = zip(*rows, strict=True)
        for i, (_, _, seq, _) in enumerate(rows):
            self._batch.seq_id[i][0] = seq
        if self._llama.llama_decode(self._context, self._batch):
            raise RuntimeError("llama_decode failed")
        last = [seq for _, _, seq, is_last in rows if is_last]
        if last:
            start = self._llama.llama_get_logits(self._context)
            logits = np.ctypeslib.as_array(start, (len(last), self._vocab_size))
            for seq, token in zip(last, logits.argmax(1).tolist(), strict=True):
                outputs[seq].append(token)
