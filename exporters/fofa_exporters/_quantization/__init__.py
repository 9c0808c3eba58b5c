"""Post-training quantization of an ONNX graph, shared by every back end: observe once, then write as many Q/DQ graphs as asked.

prepare.py      the graph that everything starts from: constants and BatchNorm folded, shapes known
statistics.py   what the activations do on the calibration images, streamed
sensitivity.py  what each layer's quantization alone does to the logits
observed.py     these three, found out once per graph
ranges.py       statistics -> ranges: min-max, moving average, percentile, entropy, MSE
scheme.py       all that decides a quantized graph
recover.py      what makes a quantized graph better without training: smoothing, learned rounding, bias correction
recipes.py      the recipes that grow from one placement of pairs
writer.py       graph + what was observed + scheme -> Q/DQ graph, by onnxruntime's writer
"""

from fofa_exporters._quantization.prepare import prepare
from fofa_exporters._quantization.scheme import Scheme
from fofa_exporters._quantization.statistics import require_calibration
from fofa_exporters._quantization.writer import quantized

__all__ = ["Scheme", "prepare", "quantized", "require_calibration"]
