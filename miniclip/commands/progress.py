"""Draws the curves of a run from its log: `python -m miniclip progress FOLDER`."""

import argparse

from miniclip.run.progress import draw_log


def main(argv: list[str]):
    parser = argparse.ArgumentParser("python -m miniclip progress", description=__doc__)
    parser.add_argument("folder", help="the --output_dir of a run, also of one that is still going")
    print(f"drawn in {draw_log(parser.parse_args(argv).folder)}")
