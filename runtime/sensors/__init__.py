"""What the machine says about itself while it works: temperatures, power, clocks, memory; read from sysfs, without a service."""

from keepsight.runtime.sensors.reading import Power, PowerMode, Reading, Temperature

__all__ = ["Power", "PowerMode", "Reading", "Temperature"]
