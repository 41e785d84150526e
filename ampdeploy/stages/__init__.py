"""What each stage of the pipeline does: read artifacts, make one or two library calls, write.

The list of stages is in `pipeline.py`, everything about resuming in `run.py`; the work itself is
in the packages. Heavy imports stay inside the functions, so that planning a build costs nothing.
"""
