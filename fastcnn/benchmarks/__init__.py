# In a checkout or an editable install the benchmarks live in the top-level folder benchmarks/; a wheel holds them here.
import pathlib

__path__.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
