"""The report: one JSON file, one Markdown file, and tables of pages that are filled in from them."""

import json
import re
from pathlib import Path
from typing import Any

# Grows when a key changes its meaning or disappears.
SCHEMA = 1

Found = dict[str, Any]

# A token of the 7B model under gather: iteration, as arithmetic has it for an H100: bytes over the rates of
# memory that such kernels reach there, and the kernels that only move activations by their number.
_MATMUL_BYTES_PER_SECOND, _ATTENTION_BYTES_PER_SECOND, _OTHER_SECONDS = 2.7e12, 2.0e12, 4.0e-3


def write(found: Found, folder: Path, *, pages: list[Path]) -> None:
    """Write the report's files, and fill in the tables of pages."""
    write_json(found, folder)
    path = folder / f"{_stem(found)}.md"
    path.write_text(markdown(found))
    print(f"\n{path.read_text()}\n{path}")
    for page in pages:
        fill(page, found)


def compare_parts(found: Found) -> None:
    """Add the figures that are of two parts: the decode loop's speed as a share of vLLM's, in ``vllm``."""
    values = {name: found["parts"].get(name, {}).get("values", {}) for name in ("decode", "vllm")}
    loop, other = (
        values["decode"].get("loop_tokens_per_second"),
        values["vllm"].get("vllm_tokens_per_second"),
    )
    if loop and other:
        values["vllm"]["loop_share_of_vllm"] = loop / other


def write_json(found: Found, folder: Path) -> None:
    """Write the figures as JSON."""
    (folder / f"{_stem(found)}.json").write_text(json.dumps(found, indent=1) + "\n")


def _stem(found: Found) -> str:
    return f"{found['check'].replace('_', '-')}{'-rehearsal' if found['is_rehearsal'] else ''}"


def markdown(found: Found) -> str:
    """Return the report for people."""
    title = "# A rehearsal on a CPU: none of these figures means anything" if found["is_rehearsal"] else None
    lines = [title or f"# {found['machine']['device']}, {found['num_ranks']} rank(s)", "", facts_line(found)]
    lines += ["", *summary_table(found)]
    if token := token_table(found):
        lines += ["", "A token of the decode loop, by part:", "", *token]
    for name, part in found["parts"].items():
        if part["values"]:
            lines += ["", f"## {name}", "", "| figure | value |", "|---|---|"]
            lines += [f"| `{key}` | {shown(key, value)} |" for key, value in part["values"].items()]
    return "\n".join(lines) + "\n"


def facts_line(found: Found) -> str:
    """Return a sentence about machine and versions."""
    machine = found["machine"]
    versions = [
        f"{name} {machine[name]}" for name in ("torch", "triton", "transformers", "deepspeed", "vllm")
    ]
    return (
        f"{found['date'][:10]}, commit {found['commit']}, Python {machine['python']}, driver "
        f"{machine['driver']}; {', '.join(versions).replace('None', 'not installed')}. "
        f"{found.get('seconds', 0):.0f} s in all."
    )


def summary_table(found: Found) -> list[str]:
    """Return a table with a row for each part."""
    lines = ["| part | result | right | wrong | seconds | remarks |", "|---|---|---|---|---|---|"]
    for name, part in found["parts"].items():
        wrong = [check for check, is_right in part["checks"].items() if not is_right]
        remarks = [part["reason"]] if part["reason"] else []
        if part["status"] != "skipped":  # else the reason says it
            remarks += [f"not tried: {section}: {why}" for section, why in part["skipped"].items()]
        text = "; ".join(remarks).replace("|", "/").replace("\n", " ")
        num_right = len(part["checks"]) - len(wrong)
        result = part["status"].replace("_", " ")
        lines.append(f"| {name} | {result} | {num_right} | {len(wrong)} | {part['seconds']:.0f} | {text} |")
    return lines


def token_table(found: Found) -> list[str]:
    """Return the table of a token's time by part: arithmetic, limit and measurement; [] without figures."""
    values = found["parts"].get("decode", {}).get("values", {})
    if "token_seconds" not in values:
        return []
    rate = values["copy_bytes_per_second"]
    sizes = {"matmul": values["token_weights_bytes"], "attention": values["token_cache_bytes"]}
    guesses = {
        "matmul": sizes["matmul"] / _MATMUL_BYTES_PER_SECOND,
        "attention": sizes["attention"] / _ATTENTION_BYTES_PER_SECOND,
        "other": _OTHER_SECONDS,
    }
    names = {"matmul": "matrix products: weights", "attention": "attention: keys and values"}
    names |= {"other": "all other kernels", "idle": "nothing runs"}
    lines = [
        "| part | GB | ms, H100, arithmetic | ms at a copy's rate | ms, measured |",
        "|---|---|---|---|---|",
    ]

    def row(name: str, size: float | None, guess: float | None, limit: float | None, value: Any) -> str:
        shown_size = "" if size is None else f"{size / 1e9:.2f}"
        times = ["" if each is None else f"{each * 1e3:.2f}" for each in (guess, limit, value)]
        return f"| {name} | {shown_size} | {' | '.join(times)} |"

    for key, name in names.items():
        size = sizes.get(key)
        limit = size / rate if size is not None else None
        lines.append(row(name, size, guesses.get(key), limit, values.get(f"token_{key}_seconds")))
    total = sum(sizes.values())
    lines.append(row("in all", total, sum(guesses.values()), total / rate, values["token_seconds"]))
    return lines


# Tables that pages may have, by the name in their markers.
TABLES = {"summary": summary_table, "token": token_table}


def fill(page: Path, found: Found) -> None:
    """Replace what stands between the markers of a page's tables.

    A table ``NAME`` stands between ``<!-- gpu_check: NAME -->`` and ``<!-- gpu_check: end -->``. What a
    report has no figures for stays as it is.

    Raises:
        SystemExit: The page has no markers.
    """
    text, count = page.read_text(), 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        lines = TABLES[match[2]](found) if match[2] in TABLES else []
        if not lines:
            return match[0]
        return "\n".join([match[1], facts_line(found), "", *lines, match[3]])

    pattern = r"(<!-- gpu_check: (\w+) -->)\n.*?(<!-- gpu_check: end -->)"
    text = re.sub(pattern, replaced, text, flags=re.DOTALL)
    if not count:
        raise SystemExit(
            f"{page}: has no table to fill in, <!-- gpu_check: NAME --> to <!-- gpu_check: end -->"
        )
    page.write_text(text)
    print(f"{page}: {count} table(s)")


def shown(key: str, value: Any) -> str:
    """Return a figure for people, by the unit at the end of its key."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    units = {
        "bytes_per_second": (1e9, "GB/s"),
        "flops_per_second": (1e12, "TFLOP/s"),
        "bytes": (2**30, "GiB"),
    }
    units |= {"tokens_per_second": (1, "tokens/s"), "elements_per_second": (1e9, "G elements/s")}
    for ending, (factor, unit) in units.items():
        if key.endswith(ending):
            return f"{value / factor:,.2f} {unit}"
    if "share" in key:
        return f"{value:.0%}"
    if key.endswith("seconds"):
        return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
