-- How many items are parked, and what they take. KEYS: as for room.lua; Reply: {items, bytes}
local bytes, estimated, at = taken()
keep(bytes, estimated, at)
return {redis.call('HLEN', KEYS[1]), bytes}
