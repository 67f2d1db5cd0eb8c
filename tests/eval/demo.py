"""A sweep with plausible figures, to view reports without a model."""

import random
from typing import Any

from s1engine.eval.methods import RunSettings
from s1engine.eval.summary import Prices, RunRows, summarize

IDENTITY = {
    "task": "aime24",
    "model": "models/s1-demo",
    "base_url": None,
    "questions": 30,
    "questions_sha256": "0123456789abcdef" * 4,
    "seed": 0,
}
TRACE = [
    ["Let me count the walks.\n\n9/s + t = 4, so s = 2.5 and t = 24 minutes.\n", 0],
    ["Wait", 1],
    [", check the second: 9/4.5 + 0.4 = 2.4. It holds, so the walk takes 3 h 24 min.\n", 0],
    ["<|im_start|>answer\nFinal Answer:", 1],
    [" 204<|im_end|>", 0],
]
NASTY = "</script><script>document.title='hacked'</script><img src=x onerror=alert(1)> & \"q\""


Row = dict[str, Any]
BUDGETS = {0: 0.05, 500: 0.1, 1000: 0.18, 2000: 0.3, 4000: 0.42, 8000: 0.5}


def rows(settings: RunSettings, chance: float, thinking: float, speed: float) -> list[Row]:
    """30 rows that are right with ``chance``, at ``speed`` tokens/s; the first two with traces."""
    rng = random.Random(str(settings.to_json()))
    wall = 30 * (thinking + 60) / speed
    return [
        {
            "id": f"aime-{i}",
            "settings": settings.to_json(),
            "thinking_tokens": round(thinking * rng.uniform(0.8, 1.2)) if thinking else 0,
            "answer_tokens": rng.randint(40, 80),
            "generated_tokens": round(thinking + 60),
            "waits_used": settings.num_waits,
            "end_reason": "budget" if settings.budget is not None else "natural",
            "seconds": wall * rng.uniform(0.5, 1),
            "extracted": "204",
            "answer": "204",
            "correct": rng.random() < chance,
            "session": 0,
            "finished_s": wall * (i + 1) / 30,
            **(
                {"question": NASTY if i else "How long is the walk?", "trace": TRACE}
                if i < 2
                else {}
            ),
        }
        for i in range(30)
    ]


def demo_sweep() -> tuple[dict[str, Any], list[Row]]:
    """A summary and its rows: three methods, some of their runs at 0 tokens."""
    runs = []
    for budget, chance in BUDGETS.items():
        settings = RunSettings("budget-forcing", budget)
        runs.append(RunRows(settings, rows(settings, chance, 0.8 * budget, 5200 - budget / 4)))
    for waits, chance in ((2, 0.53), (4, 0.57)):
        settings = RunSettings("budget-forcing", None, waits)
        runs.append(RunRows(settings, rows(settings, chance, 6000 + 700 * waits, 2600)))
    for budget, chance in ((1024, 0.2), (4096, 0.33), (16384, 0.36)):
        settings = RunSettings("token-conditional", budget)
        runs.append(RunRows(settings, rows(settings, chance, 7000 + budget / 20, 3000)))
    for samples, chance in ((1, 0.2), (4, 0.3), (16, 0.4)):
        settings = RunSettings("majority-voting", samples=samples)
        runs.append(RunRows(settings, rows(settings, chance, 900 * samples, 2000 * samples**0.6)))
    summary = summarize(runs, seed=0, prices=Prices(watts=700, dollars_per_hour=3))
    return summary, [row for run in runs for row in run.rows]
