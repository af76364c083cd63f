"""
The methods as ART trainers, and runs on disk. Of the library, this package alone imports ART.

The first import of ART on a machine writes its configuration, ``~/.art/config.json``. Another process that imports it in that
same moment (a second rank, a test's worker) can find the file missing first and present afterwards, which ART 1.20.1 answers
with a NameError. By then the file is there, so a second attempt succeeds.
"""

try:
    import art.config
except NameError:
    import art.config  # noqa: F401
