"""Networks on paper: the calls they make, and the bytes and FLOPs these cost."""

from fastcnn.study.counting import Summary, summary

__all__ = ["Summary", "summary"]
