"""``python -m perf``: each command is imported when it is asked for. torch and the DSL take 3 s to import, which a
prediction that is kept does without."""

from __future__ import annotations

import click


class _Commands(click.Group):
    """``predict``, which may need no kernel, and those of ``perf/command_line.py``, which import torch."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(["predict", *_others().commands])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name == "predict":
            from perf.predict.command import predict

            return predict
        return _others().get_command(context, name)


def _others() -> click.Group:
    from perf.command_line import main as others

    return others


def _show_version(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from cute_fa import __version__

    click.echo(f"perf, version {__version__}")
    context.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
def main() -> None:
    """Performance figures of the kernels."""


if __name__ == "__main__":
    main()
