-- What parked items take in Redis. Shared by the scripts that change it or ask for it.
--
-- KEYS: items (hash), index (sorted set), room (hash: bytes, items, counted_at, estimated)
--
-- Workers of older versions park and do not count. They are noticed by the number of items; then all are counted anew,
-- at most once a minute, since that may take Redis a tenth of a second; meanwhile an item counts as the average one.
local OVERHEAD = 300  -- bytes that Redis needs for an item besides its text and twice its id: two hash tables, a list
local RECOUNT_S = 60

local function size(id)
  local length = redis.call('HSTRLEN', KEYS[1], id)
  return length > 0 and length + 2 * #id + OVERHEAD or 0
end

local function number(text)
  local found = text and string.find(text, '^%d+$') and tonumber(text)
  return found and found < 2 ^ 53 and found or nil
end

local function count_anew()
  local bytes = 0
  for _, id in ipairs(redis.call('HKEYS', KEYS[1])) do bytes = bytes + size(id) end
  return bytes
end

-- Bytes taken now; whether they are estimated; when they were counted (s)
local function taken()
  local items = redis.call('HLEN', KEYS[1])
  local known = redis.call('HMGET', KEYS[3], 'bytes', 'items', 'counted_at', 'estimated')
  local bytes, of, at = number(known[1]), number(known[2]), number(known[3])
  if not bytes or not of then at = nil end  -- no worker wrote it so: all is counted anew
  if at and of == items and known[4] == '0' then return bytes, '0', at end
  local now = tonumber(redis.call('TIME')[1])
  if not at or of == 0 or now >= at + RECOUNT_S or now < at then return count_anew(), '0', now end
  return math.floor(bytes * items / of), '1', at
end

local function keep(bytes, estimated, at)
  local items = redis.call('HLEN', KEYS[1])
  if items == 0 then
    redis.call('DEL', KEYS[3])
  else  -- unless Redis is full; then it is counted next time
    redis.pcall('HSET', KEYS[3], 'bytes', math.max(0, bytes), 'items', items, 'counted_at', at, 'estimated', estimated)
  end
end

-- Whether an item is there, and still the one that was parked at that time (ms); "" for any time
local function is_there(id, at)
  local held = redis.call('HGET', KEYS[1], id)
  if not held or at == '' then return held and true or false end
  local field = '"parked_at_ms": ' .. at  -- a pattern would look at each byte of what may be a megabyte
  return (string.find(held, field .. ',', 1, true) or string.find(held, field .. '}', 1, true)) and true or false
end

local function take_away(id)
  local bytes, estimated, at = taken()
  bytes = bytes - size(id)
  redis.call('HDEL', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
  keep(bytes, estimated, at)
end
