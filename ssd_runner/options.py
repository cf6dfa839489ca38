"""The command line."""

import argparse


def read_options(arguments: list[str] | None, below: str) -> argparse.Namespace:
    """The options of this call; below: text that ends --help."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [NOTEBOOK] [options]",
        description="Run the notebook from beginning to end, check the result and publish it.",
        epilog=below,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 22, 100),
        allow_abbrev=False,
    )
    add = parser.add_argument
    yes = {"action": "store_true"}
    add("notebook", nargs="?", metavar="NOTEBOOK", help="default: ssd_bccd_detection.ipynb")
    add("--check", **yes, help="check the notebook as it stands, run nothing")
    add("--demo", **yes, help="the whole notebook on drawn smears, no download, in runs/demo")
    parameter = {"metavar": "NAME=VALUE", "action": "append", "default": []}
    add("-p", **parameter, dest="param", help="override a constant of the notebook")
    add("--dataset", metavar="DIR", help="an existing copy of the dataset (also BCCD_DATASET)")
    add("--dataset-url", metavar="URL", help="another git mirror (also BCCD_URL)")
    add("--weights", metavar="FILE", help="VGG-16's features from a file (also VGG16_WEIGHTS)")
    add("--images", metavar="DIR", help="only count the cells in a folder of your own pictures")
    add("--results", metavar="DIR", help="where the results of --images go")
    add("--output", metavar="NB", help="write the executed notebook there")
    add("--html", **yes, help="also write it as a page")
    add("--fresh", **yes, help="train from the start, whatever checkpoints there are")
    add("--install", **yes, help="install missing packages")
    add("--retries", type=int, default=3, metavar="N", help="restarts of a dead kernel: 3")
    add("--timeout", type=float, metavar="S", help="seconds that a cell may take")
    add("--stall", type=float, metavar="S", help="seconds that a cell may stay silent")
    add("--quiet", **yes, help="say nothing but errors")
    return parser.parse_args(arguments)
