"""Measuring, and the emulated accelerator that makes it possible without one."""
