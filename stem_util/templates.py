"""Files made from templates, in a directory whose owner may change them by hand."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2

from stem_util import files, owned
from stem_util.errors import UserError


def environment(directory: Path) -> jinja2.Environment:
    """Reads the templates of ``directory``; ``<<x>>`` is a value, ``<% %>`` a statement, and ``|json`` quotes."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(directory),
        # Shell, YAML and Prometheus' own templates do not use these.
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["json"] = json.dumps
    return made


def check_image(name: str) -> None:
    """Refuses what cannot be the value of a flag ``--image``: the name of a container image."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", name):
        raise UserError(f"--image={name!r} is no name of an image")


def write(
    output: Path,
    kind: owned.Kind,
    texts: Mapping[str, str],
    facts: Mapping[str, Any],
    *,
    job: str,
    facts_file: str,
    scripts: Collection[str] = (),
) -> list[str]:
    """Writes the files, each atomically, and removes the other files that an earlier run of the job wrote there.

    Args:
      output: the directory; missing, empty, or of this kind.
      kind: what the directory holds.
      texts: the files' texts, by their paths in the directory.
      facts: the facts from which the files were made, written beside them.
      job: name of the job that writes.
      facts_file: name of the file of the facts.
      scripts: the files that can be executed.

    Returns:
      The names of the files that are new or have changed.

    Raises:
      UserError: the directory holds something else, or a file of it was changed by hand.
    """
    path = owned.claim(output, kind)
    with files.locked(path / f"{owned.MARKER}.lock", output):
        known = _known(path / facts_file, job)
        there = {name: (path / name).read_bytes() for name in [*texts, *known] if (path / name).is_file()}
        fresh = {name: text.encode() for name, text in texts.items()}
        changed = [n for n, data in there.items() if data != fresh.get(n) and _digest(data) not in known.get(n, ())]
        if changed:
            raise UserError(
                f"{output}: {', '.join(sorted(changed))} changed since {job} wrote it; move it away, or choose "
                "another --output and compare"
            )
        for directory in {(path / name).parent for name in fresh}:
            directory.mkdir(exist_ok=True)
        digests = {name: [_digest(data)] for name, data in fresh.items()}
        # Written before the files: if this job is killed, the next one recognises the old and the new files.
        both = {name: known.get(name, []) + digests.get(name, []) for name in [*known, *digests]}
        files.write_json(path / facts_file, {**facts, "files": both})
        for name, data in fresh.items():
            if there.get(name) != data:
                files.write_atomically(path / name, data)
        for name in scripts:
            (path / name).chmod(0o755)
        for name in there.keys() - fresh.keys():
            (path / name).unlink()
        files.write_json(path / facts_file, {**facts, "files": digests})
    return sorted(name for name, data in fresh.items() if there.get(name) != data)


def _known(path: Path, job: str) -> dict[str, list[str]]:
    """Digests of each file that the last run of the job wrote, or may have written before it was killed."""
    if not path.exists():
        return {}
    known = files.read_json(path, f"remove it and the files that {job} wrote").get("files")
    return known if isinstance(known, dict) else {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
