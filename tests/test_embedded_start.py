"""What a process gets that embeds the engine: few imports, no output, nothing changed, and memory
that grows with use and is returned."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from s1engine.config import BUNDLED_MODEL, PRESETS, EngineConfig
from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.runner.resolved_config import resolve_config

UNUSED = ("transformers", "sympy", "triton", "llguidance", "huggingface_hub", "httpx", "pydantic")
UNUSED += ("fastapi", "uvicorn", "tqdm", "matplotlib", "gguf", "ray", "torch._dynamo", "PIL")
UNUSED += ("s1engine.server", "s1engine.charts", "s1engine.eval", "s1engine.plan", "s1engine.cli")
UNUSED += ("s1engine.models.transformers_loader", "s1engine.ops.triton_ops", "s1engine.kernels")

EMBEDDED = """
import json, logging, os, signal, sys
import numpy, torch
before = set(sys.modules)
environment = dict(os.environ)
handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
root = logging.getLogger()
levels, own = (root.level, list(root.handlers)), logging.getLogger("s1engine")
threads = torch.get_num_threads()
from s1engine import LLM, SamplingParams
with LLM(**json.loads(sys.argv[1])) as llm:
    output, = llm.generate("1+1=", SamplingParams(max_tokens=2, temperature=0))
facts = {
    "modules": sorted(set(sys.modules) - before),
    "environment": [k for k in {*environment, *os.environ}
                    if environment.get(k) != os.environ.get(k)],
    "handlers": [int(s) for s, h in handlers.items() if signal.getsignal(s) != h],
    "logging": [(root.level, list(root.handlers)) != levels, own.level, len(own.handlers)],
    "threads": torch.get_num_threads() - threads,
    "tokens": len(output.outputs[0].token_ids),
}
open(FACTS, "w").write(json.dumps(facts))
"""


def run_embedded(
    tmp_path: Path, program: str = EMBEDDED, **options: Any
) -> tuple[dict[str, Any], str]:
    """The facts that EMBEDDED finds, and all that it printed."""
    file = tmp_path / "facts.json"
    command = program.replace("FACTS", repr(str(file)))
    done = subprocess.run(
        [sys.executable, "-c", command, json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(file.read_text()), done.stdout


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return run_embedded(tmp_path_factory.mktemp("embedded"))


def test_a_plain_generate_imports_nothing_that_it_does_not_use(embedded: Any) -> None:
    loaded = [
        module
        for module in embedded[0]["modules"]
        if any(module == name or module.startswith(f"{name}.") for name in UNUSED)
    ]
    assert loaded == []
    assert embedded[0]["tokens"] == 2


def test_an_embedded_engine_changes_nothing_and_prints_nothing(embedded: Any) -> None:
    facts, printed = embedded
    assert printed == ""
    assert facts["environment"] == facts["handlers"] == []
    assert facts["logging"] == [False, 0, 0]
    assert facts["threads"] == 0


GROWTH = """
import json, os, sys
from s1engine import LLM, SamplingParams
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
llm = LLM(kv_cache_memory_gb=2.0, max_num_seqs=256, enable_prefix_caching=False)
llm.close()
before = resident()
llm.start()
cache = llm.engine.runner.kv_cache
facts = {"reserved": cache.reserved_bytes, "start": cache.resident_bytes,
         "grown_at_start": resident() - before}
ids = [3 + i % 300 for i in range(600)]
def run(count):
    llm.generate([[3 + i, *ids] for i in range(count)], SamplingParams(max_tokens=8))
    return cache.resident_bytes
facts |= {"one": run(1), "again": run(1), "eight": run(8)}
facts["token"] = llm.engine.model_config.kv_bytes_per_token(cache.layers[0][0].dtype)
open(FACTS, "w").write(json.dumps(facts))
"""


def test_the_kv_cache_becomes_resident_as_it_is_used(tmp_path: Path) -> None:
    facts, _ = run_embedded(tmp_path, GROWTH)
    mib = 2**20
    assert facts["reserved"] > 400 * mib
    assert facts["start"] < 4 * mib and facts["grown_at_start"] < 100 * mib
    assert facts["one"] - facts["start"] >= 600 * facts["token"]
    assert facts["again"] < 1.5 * facts["one"]
    assert facts["eight"] >= 3 * 600 * facts["token"]  # as many run at once
    assert facts["eight"] < facts["reserved"] / 4


RELEASE = """
import gc, json, os, sys, weakref
from s1engine import LLM, SamplingParams
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def generate(llm):
    llm.generate("12 + 30 = ", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
with LLM(enable_prefix_caching=False) as llm:  # imports what a step needs
    generate(llm)
before, loaded, closed = resident(), [], []
llm = LLM(**json.loads(sys.argv[1]))
for _ in range(3):
    generate(llm)
    runner = llm.engine.runner
    parts = [runner.kv_cache.layers[0][0], runner._decoder.weights.layers[0].down.panels,
             runner._decoder, runner.kv_cache, runner.sampler]
    alive = [weakref.ref(part) for part in parts]
    del parts
    engine = llm.engine
    loaded.append(resident() - before)
    llm.close()
    llm.close()
    engine.close()  # may be called again
    dead = [ref() is None for ref in alive]
    del engine, runner
    closed.append(resident() - before)
    llm.start()
llm.close()
open(FACTS, "w").write(json.dumps({"loaded": loaded, "closed": closed, "dead": dead}))
"""


def write_larger_model(path: Path) -> int:
    """A model of random weights with the bundled one's tokenizer; returns the bytes of weights."""
    shutil.copytree(BUNDLED_MODEL, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((path / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    config["layer_types"] = ["full_attention"] * 14
    (path / "config.json").write_text(json.dumps(config))
    shapes = ModelConfig.from_dir(path).tensor_shapes()
    tensors = {name: torch.randn(shape).mul(0.02).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def test_close_returns_the_memory(tmp_path: Path) -> None:
    size = write_larger_model(tmp_path / "larger")
    assert size > 100 * 10**6
    facts, _ = run_embedded(tmp_path, RELEASE, model=str(tmp_path / "larger"), dtype="bfloat16")
    assert all(facts["dead"]), facts
    assert min(facts["loaded"]) > 0.9 * size
    assert max(facts["closed"]) < 0.4 * size
    assert max(facts["loaded"]) < 1.5 * size  # no second copy of the weights stays


THREADS = """
import gc, json, torch
from s1engine import LLM, RequestError
from s1engine._core import cpu
facts = {"torch": torch.get_num_threads()}
with LLM(num_threads=3) as llm:
    facts["asked"] = cpu.num_threads()
    with LLM() as other:
        facts["joined"] = cpu.num_threads()
    try:
        LLM(num_threads=2)
    except RequestError as error:
        facts["refused"] = error.param
    facts["after"] = cpu.num_threads()
    facts["text"] = llm.generate("1+1=")[0].outputs[0].token_ids
facts["closed"] = cpu.num_threads()
with LLM(num_threads=2) as llm:
    facts["again"] = cpu.num_threads()
    facts["same"] = llm.generate("1+1=")[0].outputs[0].token_ids
facts["torch_after"] = torch.get_num_threads()
open(FACTS, "w").write(json.dumps(facts))
"""


def test_engines_of_a_process_agree_on_the_number_of_threads(tmp_path: Path) -> None:
    facts, _ = run_embedded(tmp_path, THREADS)
    assert facts["asked"] == facts["joined"] == facts["after"] == 3
    assert facts["refused"] == "num_threads"
    assert facts["closed"] == 1 and facts["again"] == 2
    assert facts["torch"] == facts["torch_after"]
    assert facts["text"] == facts["same"]


def test_presets_are_defaults() -> None:
    for name, values in PRESETS.items():
        config = EngineConfig(preset=name)
        assert {field: getattr(config, field) for field in values} == values
        again = replace(config)  # as the resolved config is made
        assert again == config
    assert EngineConfig(preset="latency", max_num_seqs=256).max_num_seqs == 256
    assert EngineConfig(preset="latency", max_step_ms=7).max_step_ms == 7
    assert type(EngineConfig().max_num_seqs) is int and EngineConfig().max_num_seqs == 256
    latency = resolve_config(EngineConfig(preset="latency", device="cpu"))
    assert latency.max_num_seqs == 16 and latency.max_step_ms == 20
    assert resolve_config(EngineConfig(preset="throughput", device="cpu")).max_step_ms == 0
    with pytest.raises(RequestError, match="latency, throughput") as caught:
        EngineConfig(preset="fast")  # type: ignore[arg-type]
    assert caught.value.param == "preset"


def test_a_model_of_transformers_leaves_the_environment_as_it_is(tmp_path: Path) -> None:
    facts, _ = run_embedded(tmp_path, model_impl="transformers")
    assert any(module == "torch._dynamo" for module in facts["modules"])
    assert facts["environment"] == facts["handlers"] == []
