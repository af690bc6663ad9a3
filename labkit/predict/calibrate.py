"""Fits each engine's constants to published decode times, and tries them on what was left out.

`python -m labkit.predict.calibrate` prints all errors; with --write it fits again first, and writes engines.json.

Published times (decode.csv) are of gpt-fast, a single sequence and nothing else; of servers under a constant number of
requests, whose time per token includes the prompts of others; and of one whose prompts are computed elsewhere (no output is
named). Fitted are the rows with tp of 1 and 2; those with more are held out, and so are expert parallelism, a kind of hardware
and one of models (`HELD_HARDWARE`, `HELD_MODELS`). A row's relative error counts, so that no model outweighs another. Nothing
else is adjusted: bytes, operations and exchanges follow from shapes, datasheets and collectives.csv.

Of collectives, every other size is held out and read off between its neighbours.
"""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from labkit.predict import cost
from labkit.predict.cost import Engine, Load, deployment
from labkit.predict.hardware import HERE, Curve, curves, in_node, table

HELD_HARDWARE = ("mi250x-gcd",)
HELD_MODELS = (("mixtral-8x7b", "int8"),)  # read better than the 8-bit dense layers of the same program
# Lengths of requests are drawn from 0.8 to 1 times what a row names (its source's benchmark does so).
SERVED = 0.9
Row = dict[str, Any]


def rows() -> list[Row]:
    """decode.csv with numbers as numbers, and whether a row is fitted ("fit"), held out ("held"), or neither (""): what its own
    source calls anomalous."""
    with (HERE / "decode.csv").open(encoding="utf-8") as file:
        found: list[Row] = list(csv.DictReader(file))
    for row in found:
        for name in ("tp", "ep", "batch", "prompt", "output"):
            row[name] = int(row[name] or 0)
        row["tpot_ms"] = float(row["tpot_ms"])
        held = (
            row["tp"] > 2
            or row["ep"] > 1
            or row["hardware"] in HELD_HARDWARE
            or (row["model"], row["dtype"]) in HELD_MODELS
        )
        row["use"] = "" if row["note"] == "anomalous" else "held" if held else "fit"
    return found


def predicted(row: Row, engine: Engine) -> float:
    """Milliseconds per token that the model gives for a row."""
    serving = row["batch"] > 1 and row["output"] > 0
    prompt, output = (round(SERVED * row[name]) if serving else row[name] for name in ("prompt", "output"))
    load = Load(
        batch=row["batch"], context=prompt + output / 2, dtype=row["dtype"], prompt=prompt,
        prompt_tokens_per_token=prompt / output if serving else 0.0,
    )  # fmt: skip
    layout = {"tp": row["tp"], "dp": max(1, row["ep"] // row["tp"]), "ep": row["ep"] > 1}
    at = deployment(row["model"], row["hardware"], **layout, engine_=row["engine"], load=load)
    # What is cut and cached how is known of a row's engine, whosever constants are tried.
    return replace(at, engine=replace(engine, head=at.engine.head)).decode().seconds * 1e3


def fit(engine: Engine, names: Sequence[str], chosen: Sequence[Row]) -> Engine:
    """The engine with the constants `names` (of `Engine`, or a dtype of its weight_only) that bring the least squares of
    relative errors over the chosen rows: Gauss-Newton, in logarithms, so that all stay above zero."""

    def with_(x: np.ndarray) -> Engine:
        values = dict(zip(names, np.exp(x).tolist(), strict=True))
        narrow = {k: v for k, v in values.items() if k in engine.weight_only}
        plain = {k: v for k, v in values.items() if k not in narrow}
        return replace(engine, **plain, weight_only={**engine.weight_only, **narrow})

    def errors(x: np.ndarray) -> np.ndarray:
        return np.array([predicted(row, with_(x)) / row["tpot_ms"] - 1 for row in chosen])

    start = [engine.weight_only[n] if n in engine.weight_only else getattr(engine, n) for n in names]
    x = np.log(start)
    for _ in range(30):
        now = errors(x)
        slopes = np.array([(errors(x + 1e-4 * e) - now) / 1e-4 for e in np.eye(len(x))]).T
        step = np.linalg.lstsq(slopes, -now, rcond=None)[0]
        x = x + np.clip(step, -0.5, 0.5)
        if np.abs(step).max() < 1e-4:
            break
    return with_(x)


def calibrate() -> dict[str, Engine]:
    """All engines, fitted one after another: what a later one's rows can't tell, it takes from an earlier one."""
    fitted = [row for row in rows() if row["use"] == "fit"]

    def of(engine: str, dtype: str = "fp8", moe: bool = False) -> list[Row]:
        return [
            row for row in fitted
            if (row["engine"], row["dtype"], row["model"].startswith("mixtral")) == (engine, dtype, moe)
        ]  # fmt: skip

    where = f"decode.csv, tp 1 and 2, {len(fitted)} rows"
    blank = Engine("vllm", 0.8, 0.7, 40.0, 0.3, 20.0, {"int8": 0.9, "int4": 0.8, "int4-g32": 0.8}, "tp", False, where)
    steady = ("bandwidth", "arithmetic", "layer_us", "sequence_us")
    vllm = fit(blank, steady, of("vllm"))
    trt = fit(replace(vllm, name="tensorrt-llm", fp8_cache=True), steady, of("tensorrt-llm"))
    # One sequence says nothing of arithmetic, nor of more sequences.
    fast = fit(replace(vllm, name="gpt-fast", head="whole"), ("bandwidth", "layer_us"), of("gpt-fast", "bfloat16"))
    for dtype in ("int8", "int4-g32"):
        fast = fit(fast, (dtype,), of("gpt-fast", dtype))
    fast = fit(fast, ("moe_layer_us",), of("gpt-fast", "bfloat16", moe=True))
    narrow = {**fast.weight_only, "int4": fast.weight_only["int4-g32"]}
    everyones = [row for name in ("vllm", "tensorrt-llm") for row in of(name)] + of("gpt-fast", "bfloat16")
    typical = fit(replace(vllm, name="typical", source=f"all engines together; {where}"), steady, everyones)
    engines = (typical, vllm, replace(vllm, name="sglang", source=f"as vllm, not fitted; {where}"), trt, fast)
    return {e.name: replace(e, moe_layer_us=fast.moe_layer_us, weight_only=narrow) for e in engines}


def decode_errors(engines: dict[str, Engine]) -> list[Row]:
    """decode.csv with `predicted_ms` and the relative `error` of each row."""
    done = []
    for row in rows():
        ms = predicted(row, engines[row["engine"]])
        done.append(row | {"predicted_ms": ms, "error": ms / row["tpot_ms"] - 1})
    return done


def collective_errors() -> list[Row]:
    """For every other size of each curve of collectives.csv, its relative error when read off the sizes around it."""
    done = []
    for (name, op, algorithm), by_ranks in curves().items():
        for ranks, curve in by_ranks.items():
            kept = Curve.of(curve.sizes[::2], curve.measured[::2], "")
            for size, seconds in list(zip(curve.sizes, curve.measured, strict=True))[1:-1:2]:
                done.append(
                    {
                        "hardware": name, "op": op, "algorithm": algorithm, "ranks": ranks, "bytes": size,
                        "error": kept.at(size) / seconds - 1,
                    }
                )  # fmt: skip
    return done


def borrowed_errors() -> list[Row]:
    """What is wrong when a kind of hardware has no curves of its own: each one's, predicted from h100-sxm's by its link."""
    done = []
    for (name, op, algorithm), by_ranks in curves().items():
        if name == "h100-sxm" or algorithm == "deepep" or ("h100-sxm", op, algorithm) not in curves():
            continue
        hw = replace(table()[name], like="h100-sxm")
        for ranks, curve in by_ranks.items():
            for size, seconds in zip(curve.sizes, curve.measured, strict=True):
                guess = in_node(hw, op, algorithm, ranks, size).seconds
                done.append(
                    {"hardware": name, "op": op, "algorithm": algorithm, "bytes": size, "error": guess / seconds - 1}
                )
    return done


def summary(errors: Sequence[Row]) -> dict[str, float]:
    sizes = [abs(row["error"]) for row in errors]
    return {"rows": len(sizes), "median": median(sizes), "worst": max(sizes)}


def validation(engines: dict[str, Engine] | None = None) -> dict[str, Any]:
    """Errors, absolute and relative to what was measured, of what was fitted and what was held out."""
    engines = engines or cost.engines()
    decode = decode_errors(engines)
    typical = decode_errors(dict.fromkeys(engines, engines["typical"]))
    groups: dict[str, list[Row]] = {}
    for row in decode:
        groups.setdefault(f"{row['engine']}, {row['hardware']}, {row['use'] or 'anomalous'}", []).append(row)
    return {
        "decode_held_out": summary([row for row in decode if row["use"] == "held"]),
        "decode_fitted": summary([row for row in decode if row["use"] == "fit"]),
        "decode_held_out_typical_engine": summary([row for row in typical if row["use"] == "held"]),
        "decode_groups": {name: summary(group) for name, group in groups.items()},
        "collectives_held_out": summary(collective_errors()),
        "collectives_borrowed_from_h100": {
            name: summary([row for row in borrowed_errors() if row["hardware"] == name])
            for name in dict.fromkeys(row["hardware"] for row in borrowed_errors())
        },
        "decode": decode,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    engines = calibrate() if "--write" in sys.argv[1:] else None
    result = validation(engines)
    if engines:
        kept = {e.name: {k: v for k, v in vars(e).items() if k != "name"} for e in engines.values()}
        errors = {k: v for k, v in result.items() if k != "decode"}
        text = json.dumps(_rounded({"engines": kept, "errors": errors}), indent=1)
        (HERE / "engines.json").write_text(text + "\n", encoding="utf-8")
    for row in result.pop("decode"):
        print(
            f"{row['model']:14} {row['dtype']:9} {row['hardware']:11} {row['engine']:12} tp {row['tp']} batch {row['batch']:3} "
            f"{row['prompt']:5}+{row['output']:<5} {row['tpot_ms']:7.2f} ms, predicted {row['predicted_ms']:7.2f} "
            f"({row['error']:+.1%}) {row['use'] or row['note']}"
        )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
