"""Where do the results go? Each command writes its own part of RESULTS.md and leaves the others alone. A run that
measures some things only writes a part of its own.

Speeds of CPUs go to results/<processor>.json first; their part of RESULTS.md has a table for each processor there.
"""

import argparse
import json
import os
import platform
import re
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
PER_PROCESSOR = ("cpu", "runtimes")


def write_section(name: str, markdown: str, results: Path | None = None):
    """Puts the text between `<!-- name -->` and `<!-- /name -->`, in place of what was there, else at the end."""
    results = results or RESULTS
    if name in PER_PROCESSOR:
        markdown = each_processor(results.parent / "results", name, markdown.strip())
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n{markdown.strip()}\n{end}"
    text = results.read_text() if results.exists() else "# Results\n"
    found = re.search(f"{re.escape(start)}.*?{re.escape(end)}", text, re.DOTALL)
    if found:
        text = text[: found.start()] + section + text[found.end() :]
    else:
        text = text.rstrip() + f"\n\n{section}\n"
    partial = results.with_suffix(".tmp")  # so that an interrupted run leaves the old file whole
    partial.write_text(text)
    os.replace(partial, results)


def section(name: str, parser: argparse.ArgumentParser, options: argparse.Namespace, *chosen: str) -> str:
    """The section that a run writes: its command's or, if one of the options `chosen` is not its default, one that is
    named after its values too. So what a whole run has measured stays."""
    given = [getattr(options, option) for option in chosen if getattr(options, option) != parser.get_default(option)]
    return " ".join([name, *(str(one) for some in given for one in (some if isinstance(some, list) else [some]))])


def each_processor(folder: Path, name: str, markdown: str) -> str:
    """Keeps this processor's part of a name, and returns those of all, each with the processor in its heading."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f"{file_name()}.json"
    kept = json.loads(mine.read_text()) if mine.exists() else {"processor": cpu_name()}
    partial = mine.with_suffix(".tmp")
    partial.write_text(json.dumps(kept | {name: markdown.splitlines()}, indent=1) + "\n")
    os.replace(partial, mine)
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    parts = [(one["processor"], one[name]) for one in found if name in one]
    return "\n\n".join("\n".join([f"{head}: {processor}", *lines]) for processor, (head, *lines) in parts)


def machine() -> str:
    """One line: the processor or GPU, cores, memory, the versions of python and torch, today's date."""
    import torch  # here, so that a driver which only writes stays small: what it starts would inherit its peak memory

    parts = [f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {memory_gb():.0f} GB"]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        parts.insert(0, f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB")
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}", date.today().isoformat()]
    return "; ".join(parts)


def cpu_name() -> str:
    """The processor's name and its family and model, as a virtual machine may keep the rest of the name to itself."""
    try:
        fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):  # no Linux, or no x86
        return platform.processor() or platform.machine()


def file_name() -> str:
    """This processor's, of the files in results/."""
    return re.sub("[^a-z0-9]+", "-", cpu_name().lower()).strip("-")


def memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
