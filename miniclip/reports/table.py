"""The Recall@K table that train.py and evaluate.py print."""

from miniclip.retrieval import KS


def format_table(metrics: dict[str, float], ks=KS) -> str:
    """The Recall@K table, in percent."""
    rows = [("", *(f"R@{k}" for k in ks), "median rank", "mean rank", "MRR")]
    for direction in ("image_to_text", "text_to_image"):
        shares = [f"{100 * metrics[f'{direction}_R@{k}']:.1f}" for k in ks]
        ranks = [f"{metrics[f'{direction}_median_rank']:.0f}", f"{metrics[f'{direction}_mean_rank']:.1f}"]
        rows.append((direction.replace("_", " "), *shares, *ranks, f"{metrics[f'{direction}_MRR']:.3f}"))
    return "\n".join("  ".join(cell.rjust(max(7, len(head))) if i else cell.ljust(14)
                               for i, (cell, head) in enumerate(zip(row, rows[0]))) for row in rows)  # fmt: skip
