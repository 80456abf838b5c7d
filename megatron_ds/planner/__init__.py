"""Plans of runs before they are paid for: memory, bytes on the wire, time, and layouts, without the devices."""
