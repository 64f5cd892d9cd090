"""Batch jobs: a file of prompts in, a file of texts out, however long, and again where it was if it was killed.

```python
from flexgen_hf.apps import batch

report = batch.run("prompts.jsonl", "texts.jsonl", model, tokenizer, options={"max_new_tokens": 64})

for result in batch.texts(({"prompt": line} for line in lines), model, tokenizer):  # any iterable, in a pipeline
    print(result.index, result.texts)
```
"""

from .requests import Prompting, Result, texts
from .runner import Job, JobReport, run
from .settings import generation_options
from .watching import watch

__all__ = ["Job", "JobReport", "Prompting", "Result", "generation_options", "run", "texts", "watch"]
