"""Cost and surroundings of a computation: operations, time, memory, machine; plain torch, imported late."""
