"""What the machine says about itself while it works: temperatures, power, clocks, memory; read from sysfs, without a service."""

from keepsight.runtime.sensors.reading import Power, PowerMode, Reading, Temperature
from keepsight.runtime.sensors.sensors import Sensors

__all__ = ["Power", "PowerMode", "Reading", "Sensors", "Temperature"]
