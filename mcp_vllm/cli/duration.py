"""Times on the command line: 90s, 30m, 12h, 2d."""

import typer

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """ "30m" as seconds. Raises typer.BadParameter."""
    unit = _UNITS.get(text[-1:])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time such as 90s, 30m, 12h or 2d") from None
