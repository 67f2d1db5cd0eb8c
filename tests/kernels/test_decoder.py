"""Whole models on the kernels, in Triton's interpreter, against the same models on torch."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.errors import RequestError
from s1engine.kernels import launch_table
from s1engine.models.decoder import Decoder
from s1engine.models.interface import CausalLM
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.models.model_facts import ModelFacts
from s1engine.models.transformers_config import TransformersConfig
from s1engine.models.transformers_loader import load_transformers_decoder
from s1engine.ops import Ops, select_ops
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from s1engine.outputs import CompletionOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.models.harness import Rows
from tests.tiny_models import YARN, make_model, make_transformers_model

SHORT_YARN = {"rope_parameters": {**YARN, "original_max_position_embeddings": 8}}
FULL = {"layer_types": ["full_attention"]}


@pytest.fixture(autouse=True)
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs to interpret; test_linear covers the other tiles."""
    table = launch_table.skinny_gemm_tiles

    def tall(tokens: int, n: int, k: int, itemsize: int) -> launch_table.SkinnyTiles:
        tiles = table(tokens, n, k, itemsize)
        return launch_table.SkinnyTiles(64, tiles.block_t, 64, min(tiles.split_k, 2), tiles.launch)

    monkeypatch.setattr(launch_table, "skinny_gemm_tiles", tall)


def decoder(path: Path, ops: Ops, quantization: str | None = None) -> Decoder:
    config = ModelConfig.from_dir(path)
    return load_decoder(path, config, torch.float32, "cpu", ops, quantization=quantization)


def greedy_tokens(model: CausalLM, prompts: list[list[int]], chunk: int, steps: int) -> list[int]:
    """Feed prompts in chunks, so rows are at different positions, then ``steps`` tokens each."""
    rows = Rows(model, len(prompts), max(map(len, prompts)) + steps, block_size=16)
    pending = [list(prompt) for prompt in prompts]
    tokens = []
    left = steps
    while left:
        chunks = [waiting[:chunk] for waiting in pending]
        logits = rows.step(chunks)
        pending = [waiting[chunk:] for waiting in pending]
        done = [not waiting for waiting in pending]
        for row, ended in enumerate(done):
            if ended:
                pending[row] = [int(logits[row][-1].argmax())]
                tokens.append(pending[row][0])
        left -= all(done)
    return tokens


@pytest.mark.parametrize(
    ("family", "sizes", "quantization"),
    [
        ("qwen2", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1}, None),
        ("qwen3", {"head_dim": 32}, None),
        ("qwen2", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}, "fp8"),
        ("gemma3", {"num_hidden_layers": 1, "tie_word_embeddings": False, **FULL}, None),
        ("olmo2", {"hidden_size": 64, "num_hidden_layers": 1}, None),
        ("ministral3", {"head_dim": 16, "num_hidden_layers": 1, **SHORT_YARN}, None),
    ],
)
def test_greedy_tokens_are_those_of_torch(
    tmp_path: Path, family: str, sizes: dict[str, Any], quantization: str | None
) -> None:
    path = make_model(tmp_path, family, **sizes)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(96, (n,), generator=generator).tolist() for n in (20, 1, 9)]
    wanted = greedy_tokens(decoder(path, TorchOps(), quantization), prompts, chunk=7, steps=3)
    got = greedy_tokens(decoder(path, TritonOps(), quantization), prompts, chunk=7, steps=3)
    assert got == wanted and len(set(wanted)) > 3


def test_a_module_of_transformers_runs_on_the_kernels(tmp_path: Path) -> None:
    """Heads of 8 lie in KV rows of 16, the narrowest that the kernels cover."""
    config = TransformersConfig.from_dir(
        make_transformers_model(tmp_path, "phi", num_hidden_layers=1)
    )
    kernels = TritonOps()

    def check_covered(facts: ModelFacts) -> None:
        kernels.check_model(
            head_dim=facts.head_dim, num_heads=facts.num_heads, num_kv_heads=facts.num_kv_heads,
            block_size=16, dtype=torch.float32, cache_dtype=torch.float32,
        )  # fmt: skip

    model = load_transformers_decoder(config, torch.float32, "cpu", kernels, check_covered)
    assert model.config.head_dim == 16
    prompts = [list(range(9)), [7]]
    got = greedy_tokens(model, prompts, chunk=7, steps=3)
    assert got == greedy_tokens(
        load_transformers_decoder(config, torch.float32, "cpu", TorchOps(), lambda facts: None),
        prompts, chunk=7, steps=3,
    )  # fmt: skip
    assert len(set(got)) > 3


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's first layer alone, which is faster to interpret."""
    path = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(BUNDLED_MODEL, path)
    fields = json.loads((path / "config.json").read_text())
    fields |= {"num_hidden_layers": 1, "layer_types": fields["layer_types"][:1]}
    (path / "config.json").write_text(json.dumps(fields))
    tensors = load_file(path / "model.safetensors")
    deeper = re.compile(r"model\.layers\.[^0]")
    kept = {name: tensor for name, tensor in tensors.items() if not deeper.match(name)}
    save_file(kept, path / "model.safetensors")
    return path


def engine(monkeypatch: pytest.MonkeyPatch, path: Path, ops: Ops, run_ahead: int = 1) -> LLMEngine:
    """An engine with little memory and few tokens a step: it chunks and preempts."""
    monkeypatch.setattr("s1engine.runner.model_runner.select_ops", lambda *_: ops)
    # Fewer programs to interpret: the only fused operation is the one that writes the cache.
    monkeypatch.setattr(launch_table, "NUM_SMS", 4)
    monkeypatch.setattr(
        launch_table, "fits_skinny_gemm", lambda tokens, n, k: tokens <= 64 and n == 256
    )
    longest = 48
    token_bytes = 2 * 2 * 32 * 4  # K and V of 2 heads of size 32 in float32
    return LLMEngine(
        EngineConfig(
            model=str(path),
            dtype="float32",
            device="cpu",
            block_size=16,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=longest,
            kv_cache_memory_gb=longest * token_bytes / 2**30,
            run_ahead=run_ahead,
        )
    )


def run(engine: LLMEngine) -> list[CompletionOutput]:
    """Questions whose budgets end in different ways, one of them asked twice."""
    questions = ["2 + 3 * 4 = ?\n\n", "9 - 5?"]
    budgets = [
        ThinkingBudget(max_tokens=8, min_tokens=8),
        ThinkingBudget(max_tokens=10, num_waits=2),
        ThinkingBudget(max_tokens=0),
    ]
    temperatures = (0.0, 1.0, 0.0)
    finished: dict[str, CompletionOutput] = {}
    for i, budget in enumerate(budgets):
        params = SamplingParams(
            temperature=temperatures[i], seed=i, max_tokens=24, thinking=budget, top_p=0.9
        )
        engine.add_request(engine.make_request(questions[i % 2], params, request_id=str(i)))
    while engine.has_unfinished:
        for request_id, event in engine.step():
            if hasattr(event, "outputs"):
                finished[request_id] = event.outputs[0]
    return [finished[str(i)] for i in range(len(budgets))]


def test_the_engine_gives_the_same_outputs(monkeypatch: pytest.MonkeyPatch, shallow: Path) -> None:
    """The kernels with five steps a launch, against torch with single steps."""
    on_torch = engine(monkeypatch, shallow, TorchOps())
    wanted = run(on_torch)
    on_triton = engine(monkeypatch, shallow, TritonOps(), run_ahead=5)
    assert run(on_triton) == wanted
    stats = on_triton.scheduler.stats()
    assert stats.num_preemptions > 0 and stats.prefix_hits > 0 and stats.num_forced_tokens > 10
    assert {output.thinking.end_reason for output in wanted if output.thinking} >= {"budget"}


def test_cuda_means_the_kernels() -> None:
    assert isinstance(select_ops("cuda"), TritonOps)


@pytest.mark.parametrize(
    ("wrong", "covered"),
    [
        ({"head_dim": 80}, "64, 128"),
        ({"block_size": 8}, "16, 32"),
        ({"dtype": torch.float64}, "bfloat16, float16"),
        ({"num_heads": 130}, "64"),
        ({"dtype": torch.float32, "head_dim": 256}, "128"),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused(wrong: dict[str, object], covered: str) -> None:
    shapes = {
        "head_dim": 64,
        "num_heads": 14,
        "num_kv_heads": 2,
        "block_size": 64,
        "dtype": torch.bfloat16,
        "cache_dtype": torch.bfloat16,
    }
    TritonOps().check_model(**shapes)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=covered):
        TritonOps().check_model(**{**shapes, **wrong})  # type: ignore[arg-type]


def test_the_runner_refuses_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s1engine.runner.model_runner.select_ops", lambda *_: TritonOps())
    with pytest.raises(RequestError, match="block_size 4"):
        LLMEngine(EngineConfig(dtype="float32", device="cpu", block_size=4))
