"""The step loop: schedule, run, update; requests in as token ids, logits and tokens out."""

from uma_engine.engine.loop import EngineLoop, Sink
from uma_engine.engine.meter import StepMeter

__all__ = ["EngineLoop", "Sink", "StepMeter"]
