"""Training curves of a run, drawn from its log.

Reads log.jsonl in the --output_dir of a run, which may still be going, and writes curves.png beside it."""

from miniclip.utils.command_line import Parser, starting


def main(argv: list[str]):
    parser = Parser.command("progress", __doc__, "runs/mine")
    parser.add_argument("folder", help="the --output_dir of a run")
    options = parser.parse_args(argv)
    with starting():
        from miniclip.run.progress import draw_log

    print(f"drawn in {draw_log(options.folder)}")
