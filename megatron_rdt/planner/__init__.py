"""What a run will need before it takes a device: parameters, memory, communication, time. Arithmetic; `measure` checks it."""
