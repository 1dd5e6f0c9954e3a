"""``ovbench data list``, ``download`` and ``fingerprint``: where benchmarks come from and what is there of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import bar, print_json, print_rich, print_text, say
from ovbench.cli.inputs import require_split, root_of, thread_count
from ovbench.errors import DataError

if TYPE_CHECKING:
    from ovbench.benchmarks.benchmark import Benchmark
    from ovbench.benchmarks.download import Downloaded
    from ovbench.benchmarks.published_files import Download

_UNKNOWN = "not known"


def data_list(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Show all that is known of these; else a table.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Show what each benchmark needs: files, size, licence, where they come from, and the layout that is expected.

    \b
    Examples:
    ovbench data list
    ovbench data list cityscapes context459
    ovbench data list --json
    """
    from ovbench.benchmarks import get
    from ovbench.benchmarks import names as known

    entries = [_entry(get(name)) for name in dict.fromkeys(names or known())]
    if json:
        print_json(entries)
    elif names:
        for entry in entries:
            print_text(_details(entry))
    else:
        _print_table(entries)


def _entry(benchmark: Benchmark) -> dict[str, Any]:
    """All that is known of one benchmark."""
    from ovbench.benchmarks.published_files import downloads

    files = {split: downloads(benchmark, split) for split in benchmark.splits}
    every = list({one.name: one for found in files.values() for one in found}.values())
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "splits": {
            split: {
                "images": one.expected_images,
                "image_files": f"{one.layout.image_dir}/*{one.layout.image_suffix}",
                "label_files": f"{one.layout.label_dir}/*{one.layout.label_suffix}",
                "split_list": one.layout.split_file or None,
                "files": [download.name for download in files[split]],
            }
            for split, one in benchmark.splits.items()
        },
        "places": [home or "." for home in benchmark.layout.homes],
        "labels": benchmark.labels_from,
        "access": _access(every),
        "files": [one.to_json() for one in every],
    }


def _access(files: list[Download]) -> str | None:
    """How the files can be had: "direct", "registration", "by hand" where one has no address; None where unknown."""
    if not files:
        return None
    if any(one.dataset.access == "registration" for one in files):
        return "registration"
    return "direct" if all(one.url for one in files) else "partly by hand"


def _print_table(entries: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text("benchmarks", style="bold"))
    for heading in ("name", "images", "access", "files of val", "licence"):
        grid.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for entry in entries:
        by_name = {one["name"]: one for one in entry["files"]}
        files = [f"{name} ({by_name[name]['size'] or _UNKNOWN})" for name in entry["splits"]["val"]["files"]]
        licences = dict.fromkeys(one["licence"] or _UNKNOWN for one in entry["files"])
        images = ", ".join(f"{split} {found['images']}" for split, found in entry["splits"].items())
        cells = (entry["name"], images, entry["access"] or _UNKNOWN, "\n".join(files) or _UNKNOWN)
        grid.add_row(*(Text(cell) for cell in (*cells, "; ".join(licences) or _UNKNOWN)))
    print_rich(grid)
    print_text("More of one: ovbench data list NAME. Fetch: ovbench data download NAME. Try: ovbench data synth NAME.")


def _details(entry: dict[str, Any]) -> str:
    lines = [f"{entry['name']}: {entry['title']}"]
    for split, found in entry["splits"].items():
        lines.append(f"  {split}: {found['images']} images")
        layout = [found["image_files"], found["label_files"], found["split_list"]]
        lines.append(f"    layout: {', '.join(part for part in layout if part)}")
        lines.append(f"    from: {', '.join(found['files']) or _UNKNOWN}")
    lines.append(
        f"  data root: the folder given as --data-root, or below it {', '.join(entry['places'][1:]) or 'none'}"
    )
    lines.append(f"  labels: {entry['labels']}")
    for one in entry["files"]:
        lines.append(f"  {one['name']}: {one['holds']} ({one['dataset']}), {one['size'] or 'size ' + _UNKNOWN}")
        lines.append(f"    address: {one['url'] or 'none that is public; see ' + one['page']}")
        checksums = [f"{name} {one[name]}" for name in ("sha256", "sha1", "md5") if one[name]]
        lines.append(
            f"    checksum: {checksums[0]} ({one['checksum_from']})" if checksums else "    checksum: not known"
        )
        page = f" ({one['licence_page']})" if one["licence_page"] else ""
        lines.append(f"    licence: {one['licence'] or _UNKNOWN}{page}; access: {one['access']}")
        lines += [f"    note: {one['note']}"] if one["note"] else []
    return "\n".join(lines)


def data_download(
    name: Annotated[str, typer.Argument(help="Benchmark ('ovbench data list').")],
    out: o.DefaultOut = Path("data/downloads"),
    split: o.Split = "val",
    dry_run: o.DryRun = False,
    json: o.Json = False,
) -> None:
    """Fetch the files of a benchmark that have a public address, and say what has to be fetched by hand.

    What is there is not fetched again; after an interruption the same command goes on where it stopped. Sizes and
    checksums are compared where they are publicly known. Exit code 3 where something is left to be fetched by hand.

    \b
    Examples:
    ovbench data download voc21
    ovbench data download coco_stuff --split all --out ~/downloads
    ovbench data download cityscapes     (registration: says what to get and what to do with it)
    """
    from ovbench.benchmarks import get
    from ovbench.benchmarks.download import download
    from ovbench.benchmarks.download.downloads import needed

    require_split(split)
    _say_terms(needed(get(name), split))
    made = download(name, out, split=split, dry_run=dry_run, bar=lambda one: bar(one.name, of_bytes=True))
    if json:
        print_json(made.to_json())
    else:
        _print_downloaded(made)
    if made.by_hand and not dry_run:
        raise typer.Exit(DataError.exit_code)


def _say_terms(files: tuple[Download, ...]) -> None:
    """The licences of what is about to be fetched, before it is."""
    for dataset in dict.fromkeys(one.dataset for one in files if one.url):
        page = f" ({dataset.licence_page})" if dataset.licence_page else f" (see {dataset.homepage})"
        say(f"{dataset.title}: licence {dataset.licence or _UNKNOWN}{page}")


def _print_downloaded(made: Downloaded) -> None:
    for one in made.fetched:
        state = "there already" if one.there else "fetched"
        checked = f"{one.verified} as known" if one.verified else f"no public checksum; sha256 {one.sha256}"
        print_text(f"{one.name}: {state}, {one.bytes} bytes, {checked}")
    for wanted in made.pending:
        print_text(f"{wanted.name}: would be fetched from {wanted.url} ({wanted.size or 'size ' + _UNKNOWN})")
    for wanted in made.by_hand:
        why = "after registration" if wanted.dataset.access == "registration" else "with a browser"
        size = f", {wanted.size}" if wanted.size else ""
        print_text(
            f"{wanted.name}: fetch it by hand, {why}, from {wanted.where} into {made.folder} ({wanted.holds}{size})"
        )
    print_text(f"Then: {made.next_command}" if made.by_hand or made.pending else f"Next: {made.next_command}")


def data_fingerprint(
    name: Annotated[str, typer.Argument(help="Benchmark ('ovbench list datasets'), or the path of your own.")],
    data_root: o.DataRoot = None,
    split: o.Split = "val",
    content: Annotated[
        bool, typer.Option("--content", help="Read all files as well: a sha256 over what is in them.")
    ] = False,
    workers: o.Workers = None,
    json: o.Json = False,
) -> None:
    """Print the fingerprint that records name a dataset by: over names and sizes of all images and labels.

    \b
    Examples:
    ovbench data fingerprint voc21 --data-root ~/data
    ovbench data fingerprint ade20k --data-root ~/data --split train --content
    ovbench data fingerprint ./mydata --json
    """
    from ovbench.benchmarks import get, own_root
    from ovbench.benchmarks.fingerprint import content_fingerprint

    benchmark = get(name)
    root = root_of(name, data_root, own_root(benchmark))
    benchmark = benchmark.for_split(split)
    found = benchmark.fingerprint(root)
    over = None
    if content:
        with bar(f"read {name} {split}") as progress:
            over = content_fingerprint(benchmark, root, workers=thread_count(workers), progress=progress)
    if json:
        where = str(benchmark.resolve_root(root))
        head = {"benchmark": benchmark.name, "version": benchmark.version, "split": split, "root": where}
        print_json({**head, "fingerprint": found, "content_sha256": over})
    else:
        print_text(found if over is None else f"{found}\ncontent {over}")
