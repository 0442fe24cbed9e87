"""The interface of FastVideo's decoding stage, for pipelines that hold one."""
