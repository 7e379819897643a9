# In a checkout or an editable install the kernels live in the top-level folder kernels/; a wheel holds them here.
import pathlib

__path__.append(str(pathlib.Path(__file__).resolve().parents[2] / "kernels"))
