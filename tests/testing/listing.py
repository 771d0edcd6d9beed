"""Listings as nvdisasm prints them, of instructions given in words."""


def listing_text(listing, arch=80):
    """``listing``: labels, and (instruction, stall count, mask of scoreboards waited for)."""
    lines = [f'\t.headerflags\t@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM{arch}"', "//------- .text.kernel -------"]
    address = 0
    for item in listing:
        if isinstance(item, str):
            lines.append(item)
            continue
        text, stall, wait = item
        lines.append(f"        /*{address:04x}*/  {text} ;   /* 0x0000000000000000 */")
        lines.append(f"                                        /* {stall << 41 | wait << 52:#018x} */")
        address += 16
    return "\n".join(lines)
