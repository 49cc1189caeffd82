"""Benchmark accuracy of a student and what changed between two of them: `mind evaluate`.

lm-evaluation-harness is the engine (models, batches, vLLM); the task files in tasks/ are ours and are read by its own
command line too (`lm_eval --include_path`). Prompts, the answer's extraction and its comparison are those of training,
`mind.prompting`. The accuracy that `mind train` measures on the way needs no harness: `mind.evaluation`.

    rows        what a data set's row becomes: a question and its accepted answers
    harness     the student and the tasks through lm-evaluation-harness
    results     intervals, the result file, the paired comparison (numpy alone)
"""
