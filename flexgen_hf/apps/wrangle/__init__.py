"""Data wrangling by prompts (Narayan et al., arXiv:2205.09911): matching entities and schemas, filling in what is
missing, finding what is wrong.

```python
from flexgen_hf.apps import wrangle

data = wrangle.read("imputation", "restaurants.csv", column="city")
outcome = wrangle.run(data, model, tokenizer, shots=wrangle.Shots(10), output="cities.csv")
print(outcome)  # rows, precision, recall, F1, accuracy, token/s
```
"""

from .choosing import Shots
from .examples import Data, Example
from .layouts import read, read_pair, with_answers
from .metrics import Scores
from .predictions import Prediction
from .runner import Outcome, prompts, run
from .tables import read_table, write_table
from .wording import Wording

__all__ = [
    "Data",
    "Example",
    "Outcome",
    "Prediction",
    "Scores",
    "Shots",
    "Wording",
    "prompts",
    "read",
    "read_pair",
    "read_table",
    "run",
    "with_answers",
    "write_table",
]
