"""Which features are built in, by the names of upstream's build switches: all of them."""

from pprint import pprint

_FEATURES = (
    "BACKWARD", "SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "FP8",
    "VARLEN", "CLUSTER", "HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256", "SM8x",
    "HDIMDIFF64", "HDIMDIFF192",
)  # fmt: skip

CONFIG = {
    "build_flags": {
        **{f"FLASHATTENTION_DISABLE_{feature}": False for feature in _FEATURES},
        # Values whose last dimension does not lie together are copied.
        "FLASHATTENTION_ENABLE_VCOLMAJOR": False,
    }
}


def show() -> None:
    """Print the configuration."""
    pprint(CONFIG)  # noqa: T203
