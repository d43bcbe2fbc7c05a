"""The compiled steps of generation: what runs on the device, and the state that it keeps there."""
