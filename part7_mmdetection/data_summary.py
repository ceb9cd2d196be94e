"""Tell a person what data_preparation.py found, prepared, repaired and rejected."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from pairs import Pair, RawData

SHOWN = 3  # file names behind each kind of finding


def print_found(raw: Path, data: RawData) -> None:
    """Say what was found, before the work begins."""
    others = ", ".join(f"{count} {ending}" for ending, count in data.other_endings.most_common(5))
    print(f"raw data  {raw}")
    print(f"layout    {data.layout}")
    print(f"found     {data.images} images, {data.masks} masks" + (f", other files: {others}" if others else ""))


def print_summary(pairs: list[Pair], rejected: Mapping[str, str], folds: int | None) -> None:
    """Print what was prepared, repaired and rejected, and what a person should look at.

    Args:
        pairs: all that were prepared.
        rejected: the reason for each rejected file.
        folds: how many there are, if there are any.
    """
    print_sources(pairs)
    if folds:
        sizes = Counter(pair.fold for pair in pairs)
        print(f"\nfolds: {', '.join(str(sizes[fold]) for fold in range(folds))} pairs; fold 0 is valid/")
    print_kinds("repaired", [(repair, name_of(pair)) for pair in pairs for repair in pair.repairs], len(pairs))
    findings = []
    for name, reason in sorted(rejected.items()):
        kind, _, details = reason.partition(": ")
        findings.append((kind, f"{name} ({details})" if details and name not in details else name))
    print_kinds("rejected, see csv_file/rejected.csv", findings)
    print_kinds("kept, but look at them", odd_pairs(pairs))


def print_sources(pairs: list[Pair]) -> None:
    """Print a row for each source, and one for all."""
    rows = [["source", "pairs", "train", "valid", "foreground", "smallest", "largest"]]
    for source in [*sorted({pair.source for pair in pairs}), None]:
        some = [pair for pair in pairs if source in (pair.source, None)]
        sides = Counter(pair.side for pair in some)
        foreground = sum(pair.foreground * pair.width * pair.height for pair in some)
        share = foreground / sum(pair.width * pair.height for pair in some)
        sizes = sorted((pair.width * pair.height, f"{pair.width} x {pair.height}") for pair in some)
        counts = [str(count) for count in (len(some), sides["train"], sides["valid"])]
        rows.append([source or "all", *counts, f"{share:.2%}", sizes[0][1], sizes[-1][1]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]))


def print_kinds(title: str, findings: Iterable[tuple[str, str]], everything: int = 0) -> None:
    """Print how often each kind of thing was found, the most frequent first, and in which files.

    Args:
        title: stands above, if there is anything.
        findings: kind and file.
        everything: a kind that was found so often was found everywhere, and no files are named.
    """
    kinds = defaultdict(list)
    for kind, name in findings:
        kinds[kind].append(name)
    if kinds:
        print(f"\n{title}")
    for kind, names in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        print(f"{len(names):6}  {kind}: {'all of them' if len(names) == everything else shown}")


def odd_pairs(pairs: list[Pair]) -> list[tuple[str, str]]:
    """Find what is no error and still not expected. Returns kinds and files."""
    odd = [("mask without foreground", name_of(pair)) for pair in pairs if pair.foreground == 0]
    odd += [("mask with nothing but foreground", name_of(pair)) for pair in pairs if pair.foreground == 1]
    sides = defaultdict(set)
    photographs = defaultdict(list)
    for pair in pairs:
        sides[pair.source].add(pair.side)
        photographs[pair.digest].append(pair)
    grouped = ", as --groups asks" if all(pair.group == pair.source for pair in pairs) else ""
    for name, sides_of_source in sides.items():
        if sides_of_source == {"valid"}:
            odd.append((f"source that is only in valid{grouped}: nothing is learned of it", name))
        if sides_of_source == {"train"}:
            odd.append((f"source that is only in train{grouped}: it has no score", name))
    for same in photographs.values():
        names = " = ".join(name_of(pair) for pair in same)
        if len({pair.side for pair in same}) > 1:
            odd.append(("the same photograph in train and in valid, so that validation is too good", names))
        elif len(same) > 1:
            odd.append(("the same photograph more than once, on one side of the split", names))
    return odd


def name_of(pair: Pair) -> str:
    """The name of a pair in the prepared data."""
    return f"{pair.source}/{pair.stem}"


def listing(rejected: Mapping[str, str], most: int = 50) -> str:
    """All rejected files with their reasons, a line each, to stand behind an error message."""
    lines = [f"{name}: {reason}" for name, reason in sorted(rejected.items())]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in lines[:most] + more)
