-- Return what a worker whose lease is over still holds to the front of its lists, oldest first. All or nothing, so
-- that of many who look one does it. Also a stopping worker's last act, with itself as the worker; and how a living one
-- gives back some of what it holds.
--
-- KEYS: leases, held (of that worker), deaths, poison, when workers began, those that died lately
-- ARGV: worker, prefix of keys, deaths that a message may cause, deaths from which it is claimed alone, the lease of who
--       looks (ms), "1" if the worker died (else it stops), and, if only some is to be returned, their delivery tags
-- Reply: messages returned, messages moved to poison; {-1, 0} if the lease is not over
local max_deaths, alone_from, usual = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local died, FIRST_TAG = ARGV[6] == '1', 7
local some = #ARGV >= FIRST_TAG
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
local till = tonumber(score or now)
if died and till > now then return {-1, 0} end
redis.call('HDEL', KEYS[2], '')  -- needs no memory, so that a full Redis lets pass what follows

local held = {}
if some then
  for i = FIRST_TAG, #ARGV do
    local item = redis.call('HGET', KEYS[2], ARGV[i])
    if item then held[#held + 1] = ARGV[i]; held[#held + 1] = item end
  end
else
  held = redis.call('HGETALL', KEYS[2])
end
local order = {}
for i = 1, #held, 2 do
  local claim, place = string.match(held[i], '^(%d+)%.(%d+):')
  order[#order + 1] = {tonumber(claim), tonumber(place), held[i], held[i + 1]}
end
table.sort(order, function(a, b) return a[1] > b[1] or (a[1] == b[1] and a[2] > b[2]) end)

-- A worker of an older version says neither when it began nor how long its lease is: it was always there.
local function life(entry)
  local began, length = string.match(entry or '', '^(%d+):(%d+)$')
  return tonumber(began or 0), tonumber(length or usual)
end

local began, lease = life(redis.call('HGET', KEYS[5], ARGV[1]))
local renewed = till - lease

-- Whether the death says something about what the worker held. It does if another, which was there, lives on; and if
-- there was no other. Where all that were there have died with it, a supervisor killed them, or the host is gone.
--
-- A message kills at most one worker per lease: the next one gets it when that is over. So who had renewed last a lease
-- before did not die with this one.
local function proves()
  local company = false
  local leases = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
  for i = 1, #leases, 2 do
    local other, ends = leases[i], tonumber(leases[i + 1])
    local since, length = life(redis.call('HGET', KEYS[5], other))
    local last = ends - length
    if other ~= ARGV[1] and since < renewed and last >= began and last > renewed - lease then
      if ends > now + length / 2 then return true end
      company = true
    end
  end
  local ended = redis.call('HGETALL', KEYS[6])
  for i = 1, #ended, 2 do
    local since, last = life(ended[i + 1])
    if ended[i] ~= ARGV[1] and since < renewed and last >= began and last > renewed - lease then company = true end
  end
  return not company
end

local proven = died and #order > 0 and proves()
if died and #order == 1 and points(KEYS[3], order[1][4]) >= alone_from * DEATH then
  proven = true  -- it was a suspect already, and alone: or many of these would kill the whole fleet at once, for ever
end

local returned, poisonous = 0, 0
for _, message in ipairs(order) do
  local tag, item = message[3], message[4]
  local list = string.match(tag, ':(.*)$')
  local total = 0
  if died then total = count(KEYS[3], item, proven and DEATH or UNPROVEN) end
  if proven and total >= max_deaths * DEATH then
    poisoned(KEYS[3], KEYS[4], list, item)
    poisonous = poisonous + 1
  else
    redis.call('RPUSH', ARGV[2] .. list, item)  -- the newest first, so the oldest ends nearest the exit
    returned = returned + 1
  end
  redis.call('HDEL', KEYS[2], tag)
end
if not some then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[5], ARGV[1])
  if redis.call('ZCARD', KEYS[1]) == 0 then redis.call('DEL', KEYS[5]) end
end
if died and score then  -- so that those that died with it know of it
  local LEASES = 4
  local ended = redis.call('HGETALL', KEYS[6])
  for i = 1, #ended, 2 do
    local _, last = life(ended[i + 1])
    if last > now or last < now - LEASES * math.max(lease, usual) then redis.call('HDEL', KEYS[6], ended[i]) end
  end
  redis.call('HSET', KEYS[6], ARGV[1], string.format('%.0f:%.0f', began, renewed))
  redis.call('PEXPIRE', KEYS[6], LEASES * math.max(lease, usual))
end
return {returned, poisonous}
