-- Renew a worker's lease, and say whose lease is over. KEYS: leases, clock, began; ARGV: worker, lease (ms)
-- Reply: ms until the next lease may be over, so that somebody looks at that moment; workers whose lease is over; when the
-- clock was set back, "" if nobody has to recall what was put off by it any more
--
-- A lease that ended while nobody could renew proves nothing: Redis was away, and its owner may be alive. So leases are
-- only called over when somebody has renewed without a gap for a whole lease, in which every living owner renewed too.
local lease = tonumber(ARGV[2])
local DAY = 86400000
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('ZREM', KEYS[1], '')  -- needs no memory, so that a full Redis lets pass what follows
local clock = redis.call('HMGET', KEYS[2], 'beat', 'since')
local beat, since = tonumber(clock[1] or 0), tonumber(clock[2] or now)
local set_back = beat > now + lease or since > now
if now - beat > lease / 2 or set_back then since = now end
redis.call('HSET', KEYS[2], 'beat', now, 'since', since)
if set_back then redis.call('HSET', KEYS[2], 'set_back', now) end

local function began(worker)  -- when it began, and how long its lease is; nil for a worker of an older version
  local at, length = string.match(redis.call('HGET', KEYS[3], worker) or '', '^(%d+):(%d+)$')
  return tonumber(at), tonumber(length)
end

-- A lease may have been written by a clock that was ahead. It lasts for its own length from now on, and its owner, if it
-- lives, renews it before that. The length of an older worker's is not known: a setting is changed worker by worker.
local ahead = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. (now + lease), '+inf', 'WITHSCORES')
for i = 1, #ahead, 2 do
  local _, length = began(ahead[i])
  local till = tonumber(ahead[i + 1])
  if not length and (set_back or till > now + DAY) then length = lease end
  if length and till > now + length then redis.call('ZADD', KEYS[1], now + length, ahead[i]) end
end

redis.call('ZADD', KEYS[1], now + lease, ARGV[1])
local at, length = began(ARGV[1])
if not at or at > now or length ~= lease then  -- no worker began later than now
  redis.call('HSET', KEYS[3], ARGV[1], string.format('%.0f:%.0f', math.min(at or now, now), lease))
end
if redis.call('HLEN', KEYS[3]) > redis.call('ZCARD', KEYS[1]) then  -- a worker of an older version leaves entries behind
  for _, worker in ipairs(redis.call('HKEYS', KEYS[3])) do
    if not redis.call('ZSCORE', KEYS[1], worker) then redis.call('HDEL', KEYS[3], worker) end
  end
end

local running = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local soonest = math.max(tonumber(running[2]), since + lease) - now + 1
local to_recall = redis.call('HGET', KEYS[2], 'set_back') or ''
if now - since < lease then return {soonest, {}, to_recall} end
return {soonest, redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now), to_recall}
