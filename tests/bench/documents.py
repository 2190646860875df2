"""Result documents made by hand, of known figures."""


def timed(median, *, half_width=0.01, speedup=None, cpu=None):
    """A variant whose quartiles lie `half_width` (a part) to both sides of its median."""
    entry = {
        "median": median,
        "q1": median * (1 - half_width),
        "q3": median * (1 + half_width),
        "min": median * (1 - 2 * half_width),
        "cpu_median": median if cpu is None else cpu,
        "repeats": 1,
    }
    if speedup is not None:
        entry |= {
            "speedup": speedup,
            "paired_speedup": speedup,
            "paired_q1": speedup * (1 - half_width),
            "paired_q3": speedup * (1 + half_width),
        }
    return entry


def case(suite, name, native, half_width=0.01, **others):
    """Native and other variants by their seconds."""
    variants = {"native": timed(native, half_width=half_width, speedup=1.0)}
    for other, seconds in others.items():
        variants[other.replace("_", " ")] = timed(seconds, half_width=half_width, speedup=seconds / native)
    return {
        "suite": suite,
        "name": name,
        "kind": "time",
        "unit": "s",
        "rounds": 7,
        "variants": variants,
        "skipped": {"asdl": "not installed", "singd": "fails: RuntimeError: no"},
        "commit": "0123456789",
        "load": 0.5,
        "threads": 2,
    }


def memory(name, native, largest, **others):
    """A memory case."""
    medians = {"native": native, **others}
    variants = {variant: {"median": n, "min": n, "max": n} for variant, n in medians.items()}
    found = case("memory", name, 1.0) | {"kind": "memory", "unit": "bytes", "variants": variants}
    return found | {"largest_activation": largest}


def growth(name, slope):
    """A growth case over 2 sizes."""
    entry = {"medians": [1e-3, 1e-3 * 2**slope], "slope": slope}
    found = case("growth", name, 1.0) | {"kind": "growth", "variants": {"native": entry}}
    return found | {"along": "batch", "x": [8, 16]}


def document(*cases, **changes):
    """A whole result."""
    machine = {
        "cpu": "Some CPU",
        "cores": 2,
        "threads": 2,
        "simd": "avx2",
        "system": "Linux x86_64",
        "python": "3.11.0",
        "torch": "2.13.0",
        "kfac_ext": "0.1.0",
        "peers": {"asdl": None, "singd": "0.0.5"},
    }
    return {
        "format": 1,
        "quick": False,
        "machine": machine,
        "cases": list(cases),
        "started": "2026-01-01 00:00:00",
        "finished": "2026-01-01 00:10:00",
        "rates_before": {"matmul_gflops": 100.0, "copy_gbs": 10.0},
    } | changes
