"""How often each source is drawn, and which augmentation its photographs get.

Article: https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/imbalanceddata/2022/08/03/segmentation-model-part2.html
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from utils import stop

# A source with n photographs is drawn in proportion to n to the power of this.
POWERS = {
    "uniform": 0.0,  # each source is as likely as any other
    "sqrt": 0.5,  # in between, as in Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, 2018
    "none": 1.0,  # each photograph is as likely as any other
}
# Whoever sees the same few photographs again and again learns them by heart. A source of which every photograph is
# drawn more often than this in an epoch gets the strong augmentation, so that they differ each time.
OFTEN = 3


def source_weights(balance: Sequence[str], photographs: Mapping[str, int]) -> dict[str, float]:
    """The probability of each source; they add up to 1. Leaves with a message if `balance` makes no sense.

    Args:
        balance: the words after --balance: one of POWERS, or a SOURCE=WEIGHT for each source.
        photographs: how many each source has for training.
    """
    if len(balance) == 1 and balance[0] in POWERS:
        shares = {source: number ** POWERS[balance[0]] for source, number in photographs.items()}
        return {source: share / sum(shares.values()) for source, share in shares.items()}
    weights: dict[str, float] = {}
    there = f"the sources are {', '.join(photographs)}"
    for word in balance:
        source, _, text = word.rpartition("=")  # a source may have a = in its name, a number has not
        if not source:
            stop(f"--balance {word}: give {', '.join(POWERS)}, or a SOURCE=WEIGHT for each source; {there}")
        if source not in photographs:
            stop(f"--balance {word}: no photographs for training are of a source {source!r}; {there}")
        if source in weights:
            stop(f"--balance: {source} has two weights; give one")
        try:
            weights[source] = float(text)
        except ValueError:
            weights[source] = math.nan
        if not 0 <= weights[source] <= 1:
            stop(f"--balance {word}: {text!r} is not a number from 0 to 1")
    for source in photographs:
        if source not in weights:
            stop(f"--balance: source {source} has no weight; {source}=0 would leave its photographs out")
    total = sum(weights.values())
    if abs(total - 1) > 0.005:  # 0.333 three times is meant to be 1
        stop(f"--balance: the weights add up to {total:g}; they have to add up to 1")
    return {source: weight / total for source, weight in weights.items()}


def plan_balance(balance: Sequence[str], strong: Sequence[str] | None, photographs: Mapping[str, int]) -> pd.DataFrame:
    """What an epoch is made of. A source of weight 0 is left out; otherwise it is as long as without balancing.

    Args:
        balance: the words after --balance.
        strong: the words after --strong_augmentation, or None to choose by OFTEN.
        photographs: how many each source has for training.

    Returns:
        A row for each source that is drawn, with the columns photographs, weight (the probability to be drawn),
        repeats (how often each of its photographs is drawn in an epoch, on average) and strong
        (whether it gets the strong augmentation).
    """
    plan = pd.DataFrame({"photographs": photographs, "weight": source_weights(balance, photographs)})
    plan = plan[plan["weight"] > 0].copy()
    plan["repeats"] = plan["weight"] * plan["photographs"].sum() / plan["photographs"]
    if strong is None:
        plan["strong"] = plan["repeats"] > OFTEN
        return plan
    strong = [] if strong == ["none"] else strong
    for source in strong:
        if source not in photographs:
            there = f"the sources are {', '.join(photographs)}"
            stop(f"--strong_augmentation {source}: no photographs for training are of such a source; {there}")
    plan["strong"] = plan.index.isin(strong)
    return plan


def show_table(plan: pd.DataFrame, row: Mapping[str, float]) -> str:
    """The sources of an epoch: how often they were drawn, and how well their nails were found.

    Args:
        plan: as `plan_balance` makes it.
        row: that of the epoch in metrics.csv.
    """

    def of_sources(prefix: str) -> pd.Series:
        named = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
        return pd.Series(named).dropna()

    ious = of_sources("val_iou/")
    columns = {
        "photographs": plan["photographs"].map("{:.0f}".format),
        "drawn": of_sources("drawn/").map("{:.1%}".format),
        "planned each": plan["repeats"].map("{:.1f}".format),
        "augmentation": plan["strong"].map({True: "strong", False: "usual"}),
        "IoU": ious.map("{:.4f}".format),
    }
    table = pd.DataFrame(columns).fillna("")  # a source may be in one of training and validation only
    table.columns.name = "source"  # above the index, in the line of the titles
    summary = f"IoU of all {row['val_iou']:.4f}, mean of the sources (macro) {row['val_macro_iou']:.4f}, "
    summary += f"worst source ({ious.idxmin()}) {row['val_worst_iou']:.4f}"
    return f"epoch {row['epoch']:.0f}:\n\n{table.to_string()}\n\n{summary}"
