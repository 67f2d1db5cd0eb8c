"""The command line of lm-evaluation-harness, with this engine among its models.

This package declares the model under the entry point ``lm_eval.models``, which the harness reads
from the release after 0.4.13 on: there ``lm_eval --model s1engine`` is enough. For earlier releases
this module registers the model and starts the harness:

    python -m s1engine.eval.harness run --model s1engine --tasks ... --apply_chat_template \\
        --model_args pretrained=DIR,max_num_seqs=64 \\
        --gen_kwargs thinking_token_budget=4096,num_waits=2
"""

import sys

from s1engine.errors import ModelError, RequestError
from s1engine.extras import require_extra


def main() -> int:
    """Runs the harness's command line; returns the exit status."""
    try:
        require_extra("harness")
        from lm_eval.__main__ import cli_evaluate

        from s1engine.eval import harness_model  # noqa: F401 (registers the model)

        cli_evaluate()
    except (ModelError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
