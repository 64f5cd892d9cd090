"""The command `lm-eval`: lm-eval's own command line, which knows the model `flexgen` there."""

from __future__ import annotations

import typer

__all__ = ["lm_eval_command"]


def lm_eval_command(context: typer.Context) -> None:
    """lm-eval, with `--model flexgen`: the arguments are those of lm-eval.

    `flexgen-hf lm-eval run --model flexgen --model_args pretrained=MODEL,policy=auto --tasks TASK`. Among
    `--model_args` are those of `from_pretrained` (`policy`, `num_batches`, `max_memory`, `compression`, `dtype`, ...)
    and those of lm-eval's `hf` that concern tokens and texts; `--batch_size` is the rows of a micro-batch. Needs
    `pip install 'flexgen_hf[lm-eval]'`.
    """
    from .integrations import lm_eval

    lm_eval.main(context.args)
