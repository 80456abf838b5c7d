"""Pipeline parallelism on DeepSpeed's PipelineModule: partition, boundaries between stages, module and engine."""
