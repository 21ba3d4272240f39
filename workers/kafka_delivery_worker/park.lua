-- Park one item, once, if there is room for it. What is parked already may always be parked again, with a new reason.
--
-- KEYS: as for room.lua, then the lock of the command, if it has one; ARGV: id, digest of its content, time (ms), item
--       (JSON), bytes that all may take (0: any), then the lock's token
-- Reply: {id under which it lies, bytes taken}; {"", bytes taken} if there is no room; {"", -1} if the lock is not the
-- command's any more
if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[6] then return {'', -1} end
local id = ARGV[1]
local namesake = id .. '~' .. string.sub(ARGV[2], 1, 8)  -- the same id, another content: a caller reused it; both stay
local held = redis.call('HGET', KEYS[1], id)
-- Found as text: quotes within strings are escaped, so this can only be the field itself.
local another = held and not string.find(held, '"digest": "' .. ARGV[2] .. '"', 1, true)
if another or redis.call('HEXISTS', KEYS[1], namesake) == 1 then id = namesake end

local bytes, estimated, at = taken()
local before = size(id)
local after = bytes - before + #ARGV[4] + 2 * #id + OVERHEAD
local limit = tonumber(ARGV[5])
if before == 0 and limit > 0 and after > limit then return {'', bytes} end

redis.call('HSET', KEYS[1], id, ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[3], id)
keep(after, estimated, at)
return {id, after}
