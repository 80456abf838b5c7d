"""What config.json of models on the Hugging Face hub carries: one file each, named organisation--model.

Written down from what is published, not downloaded: a value may differ from today's file, the fields are what counts.
"""

import json
from pathlib import Path
from typing import Any

HUB: dict[str, dict[str, Any]] = {
    file.stem.replace("--", "/"): json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((Path(__file__).parent / "hub").glob("*.json"))
}
