"""What the site makes of the files: its first page is README.md, links out of docs/ lead to the files themselves."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page, **_: object) -> str:
    """README.md as the first page; files beside docs/ by name alone, as they are not on the site."""
    if page.file.src_path == "index.md":
        markdown = (ROOT / "README.md").read_text().replace("](docs/", "](")
        return re.sub(
            r"\[([^\]]*)\]\((?!http|[\w-]+\.(?:md|png))[^)]*\)|\[CONTRIBUTING\.md\]\([^)]*\)", _text, markdown
        )
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", _text, markdown)


def _text(match: re.Match) -> str:
    return f"`{match[1]}`"
