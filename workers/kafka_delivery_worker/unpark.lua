-- Take one item away. KEYS: as for room.lua; ARGV: id, time (ms) at which it was parked, or ""
-- Returns 1; 0 if it is not there, or was parked again since that time.
local held = redis.call('HGET', KEYS[1], ARGV[1])
if not held or (ARGV[2] ~= '' and not string.find(held, '"parked_at_ms": ' .. ARGV[2] .. '[,}]')) then return 0 end
local bytes, estimated, at = taken()
bytes = bytes - size(ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
keep(bytes, estimated, at)
return 1
