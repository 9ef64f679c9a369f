"""The subcommand `bench`: the kernels against their peers."""

from __future__ import annotations

import click

from .common import Output, json_option, table


@click.command()
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="For kernels and peers alike."
)
@click.option("--quick", is_flag=True, help="Three of the six shapes, for half a second each.")
@json_option
def bench(threads: int, quick: bool, as_json: bool) -> None:
    """Measure the kernels against PyTorch, ONNX Runtime and a copy.

    Each peer is measured if it is installed (pip install fxp-layernorm[bench]), on the same data, in turns with the
    kernels. Rates are medians, in 1e9 elements a second; a ratio is how many times as fast as the peer the kernel is,
    or, with several threads, as with one. Beside that is what as many calls of one thread reach side by side, each with
    its share of the rows: what the machine allows.
    """
    from .. import benchmark

    output = Output(as_json)
    shapes = benchmark.QUICK_SHAPES if quick else benchmark.SHAPES
    with output.progress("measuring", len(shapes)) as advance:
        document = benchmark.run(threads=threads, quick=quick, advance=advance)
    peers = list(document["cases"][0]["ratio"])
    scaling = {"x 1 thread": "scaling", "side by side": "side_by_side"} if threads > 1 else {}
    environment = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    cases = []
    for case in document["cases"]:
        ratios = [case[key] for key in scaling.values()] + [case["ratio"][peer] for peer in peers]
        cases.append((case["case"], case["lane"], case["gelem_per_s"], case["us"], *ratios))
    rates = {(entry["peer"], entry["shape"]): entry["gelem_per_s"] for entry in document["peers"]}
    rows = [(shape, *(rates[peer, shape] for peer in peers)) for shape in dict.fromkeys(shape for _, shape in rates)]
    ways = [
        (entry["way"], entry["shape"], entry["gelem_per_s"], entry["us"], entry["gain"]) for entry in document["calls"]
    ]
    first = [
        (name, entry["seconds"], "read from the cache" if entry["cached"] else "compiled")
        for name, entry in document["compile_s"].items()
    ]
    output.result(
        document,
        table(
            f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}; {versions}",
            ("kernel", "lane", "Gelem/s", "us", *scaling, *(f"x {peer}" for peer in peers)),
            cases,
        ),
        table("Peers, Gelem/s", ("shape", *peers), rows),
        table("Other ways to call int8 -> int8", ("call", "shape", "Gelem/s", "us", "x the plain call"), ways),
        table("First call", ("kernel", "s", ""), first),
    )
    output.close(f"{len(cases)} cases measured")
