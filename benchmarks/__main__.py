"""``make bench``: measures, then makes the chart and the README's table from the results.

Arguments go to the benchmark; with any of them the chart and the README stay as they are.
"""

import sys

from benchmarks import bench_normalize, plot

if __name__ == "__main__":
    status = bench_normalize.main()
    if len(sys.argv) == 1:
        plot.main([])
    sys.exit(status)
