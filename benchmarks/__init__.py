"""What the tool costs, measured on the machine at hand; `RESULTS.md` holds the last results.

`python -m benchmarks.compare` in the root of the repository, with the package's dependencies installed. It needs
about 9 GB on the disk of the temporary folder, as much free memory to keep the files cached, and five minutes.
"""
