"""What do the ten queries of docs/lineage.md answer on a real store?

    python benchmarks/ten_questions.py [STORE]

Prints each question, its query and the answer that `gpt2 lineage sql` gives.
"""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "lineage.md"


def main() -> None:
    store = ["--store", sys.argv[1]] if len(sys.argv) > 1 else []
    for question, query in re.findall(
        r"^(\d+\. [^\n]+)\n\n```sql\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    ):
        command = [sys.executable, "-m", "pipeline.commands.main", "lineage", "sql", query, *store]
        print(f"{question}\n\n{query}", flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
