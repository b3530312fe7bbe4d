"""A link as people write it: `20ms,100Mbit` is a round trip of 20 ms and 100 Mbit/s."""

from __future__ import annotations

import re

from mcp_vllm.split.plan.fit import LinkFit

_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES = {"k": 1e3, "m": 1e6, "g": 1e9}
_LINK = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s),(\d+(?:\.\d+)?)([kmg])bit(?:/s)?", re.IGNORECASE)


def parse_link(text: str) -> LinkFit:
    """Raises ValueError that says how a link is written."""
    matched = _LINK.fullmatch(text.replace(" ", ""))
    if matched is None or float(matched[3]) == 0:
        raise ValueError(f'"{text}" is not RTT,BANDWIDTH, as in 20ms,100Mbit')
    rtt_s = float(matched[1]) * _TIMES[matched[2].lower()]
    bits_s = float(matched[3]) * _RATES[matched[4].lower()]
    return LinkFit(rtt_s, 8 / bits_s)
